// Tracks the person in front of the camera. This happens in the page; only keypoints leave it.
import { byId, FrameLoop, onClick, setEnabled, setText } from "./dom.ts";
import type { Pose } from "./layout.ts";
import type { PoseView } from "./stage.ts";
import type { Tracker } from "./tracker.ts";

export class Webcam {
  private readonly panel = byId("webcam-panel", HTMLDivElement);
  private readonly button = byId("camera", HTMLButtonElement);
  private readonly mirror = byId("mirror", HTMLInputElement);
  private readonly status = byId("camera-status", HTMLParagraphElement);
  private readonly video = document.createElement("video");
  private readonly loop = new FrameLoop(() => void this.track());
  private stream: MediaStream | null = null;

  /** onChange: called when the next pose may be of another person, or in another place. */
  constructor(
    private readonly view: PoseView,
    private readonly tracker: Tracker,
    private readonly emit: (pose: Pose) => void,
    private readonly onChange: () => void,
  ) {
    this.video.muted = this.video.playsInline = true;
    onClick(this.button, () => void (this.stream === null ? this.begin() : this.end()));
    this.mirror.onchange = onChange;
  }

  open(): void {
    this.panel.hidden = false;
  }

  close(): void {
    this.panel.hidden = true;
    this.end();
  }

  private async begin(): Promise<void> {
    setEnabled(this.button, false);
    let stream: MediaStream | null = null;
    try {
      this.status.textContent = "Waiting for the camera";
      stream = await openCamera();
      if (this.panel.hidden) return stop(stream);
      this.stream = this.video.srcObject = stream;
      this.watch(stream);
      await this.video.play();
      if (this.stream !== stream) return; // the camera was left meanwhile, even if its panel is open again
      this.status.textContent = "Loading the tracker";
      await this.tracker.load();
      if (this.stream !== stream) return;
      this.status.textContent = "Looking for you";
      this.button.textContent = "Stop camera";
      this.onChange();
      this.loop.start();
    } catch (error) {
      if (this.stream !== stream) return;
      this.end();
      this.status.textContent = reason(error);
    } finally {
      setEnabled(this.button, true);
    }
  }

  /** Notice when a camera stops by itself: it was unplugged, or the browser took it away. */
  private watch(stream: MediaStream): void {
    for (const track of stream.getTracks()) {
      track.onended = () => {
        if (this.stream !== stream) return;
        this.end();
        this.status.textContent = "The camera has stopped. Check that it is plugged in and allowed, then start it again";
      };
    }
  }

  private end(): void {
    this.loop.stop();
    if (this.stream !== null) stop(this.stream);
    this.stream = this.video.srcObject = null;
    this.view.setBackdrop(null);
    this.button.textContent = "Start camera";
    this.status.textContent = "";
  }

  /** Give the tracker the newest picture, unless it is still busy with an older one. */
  private async track(): Promise<void> {
    if (this.video.readyState < HTMLMediaElement.HAVE_CURRENT_DATA) return;
    const { stream } = this;
    const isMirrored = this.mirror.checked;
    try {
      const found = await this.tracker.find(this.video, isMirrored);
      if (found === null || stream === null || this.stream !== stream || this.mirror.checked !== isMirrored) return;
      this.view.setBackdrop(found.picture);
      setText(this.status, found.pose.points === null ? "Nobody is in the picture" : "Following you");
      this.emit(found.pose);
    } catch (error) {
      if (stream === null || this.stream !== stream) return;
      this.end();
      this.status.textContent = reason(error);
    }
  }
}

function stop(stream: MediaStream): void {
  stream.getTracks().forEach((track) => track.stop());
}

async function openCamera(): Promise<MediaStream> {
  // Browsers hide the camera from pages that came over plain HTTP from another machine.
  if (navigator.mediaDevices === undefined) throw new Error("The camera needs a page from localhost or over HTTPS");
  const video = { width: { ideal: 640 }, height: { ideal: 480 }, facingMode: "user" };
  return navigator.mediaDevices.getUserMedia({ video, audio: false });
}

function reason(error: unknown): string {
  if (!(error instanceof Error)) return "The tracker failed";
  if (error.name === "NotAllowedError") return "The camera was not allowed; allow it in the browser's address bar";
  if (error.name === "NotFoundError") return "There is no camera";
  if (error.name === "NotReadableError") return "The camera is in use by another program";
  return error.message;
}
