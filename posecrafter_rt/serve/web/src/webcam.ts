// The camera, and MediaPipe Holistic finding the person in it, all within this page: only keypoints leave it.
import type { Holistic as HolisticTracker, Results } from "@mediapipe/holistic";
import { byId, FrameLoop } from "./dom.ts";
import { poseFromLandmarks } from "./landmarks.ts";
import type { Pose } from "./layout.ts";
import type { PoseView } from "./stage.ts";

/** Where the build puts MediaPipe's own files. */
const TRACKER_FOLDER = "tracker/";

declare global {
  interface Window {
    Holistic?: typeof HolisticTracker;
  }
}

export class Webcam {
  private readonly panel = byId("webcam-panel", HTMLDivElement);
  private readonly button = byId("camera", HTMLButtonElement);
  private readonly mirror = byId("mirror", HTMLInputElement);
  private readonly status = byId("camera-status", HTMLParagraphElement);
  private readonly video = document.createElement("video");
  private readonly loop = new FrameLoop(() => void this.track());
  private tracker: HolisticTracker | null = null;
  private stream: MediaStream | null = null;
  private isBusy = false;

  constructor(
    private readonly view: PoseView,
    private readonly emit: (pose: Pose) => void,
  ) {
    this.video.muted = this.video.playsInline = true;
    this.button.onclick = () => void (this.stream === null ? this.begin() : this.end());
    this.mirror.onchange = () => this.tracker?.setOptions({ selfieMode: this.mirror.checked });
  }

  open(): void {
    this.panel.hidden = false;
  }

  close(): void {
    this.panel.hidden = true;
    this.end();
  }

  private async begin(): Promise<void> {
    this.button.disabled = true;
    try {
      this.status.textContent = "Waiting for the camera";
      this.stream = await openCamera();
      this.video.srcObject = this.stream;
      await this.video.play();
      this.status.textContent = "Loading the tracker";
      this.tracker ??= await loadTracker((results) => this.onResults(results));
      this.tracker.setOptions({ selfieMode: this.mirror.checked });
      this.status.textContent = "Looking for you";
      this.button.textContent = "Stop camera";
      if (this.panel.hidden) this.end();
      else this.loop.start();
    } catch (error) {
      this.end();
      this.status.textContent = reason(error);
    } finally {
      this.button.disabled = false;
    }
  }

  private end(): void {
    this.loop.stop();
    this.stream?.getTracks().forEach((track) => track.stop());
    this.stream = this.video.srcObject = null;
    this.view.setBackdrop(null);
    this.button.textContent = "Start camera";
    this.status.textContent = "";
  }

  /** Give the tracker the newest picture, unless it is still at an older one. */
  private async track(): Promise<void> {
    if (this.isBusy || this.tracker === null || this.video.readyState < HTMLMediaElement.HAVE_CURRENT_DATA) return;
    this.isBusy = true;
    try {
      await this.tracker.send({ image: this.video });
    } catch (error) {
      this.end();
      this.status.textContent = reason(error);
    } finally {
      this.isBusy = false;
    }
  }

  private onResults(results: Results): void {
    if (this.stream === null) return;
    const picture = { height: this.video.videoHeight, width: this.video.videoWidth };
    const { poseLandmarks, faceLandmarks, leftHandLandmarks, rightHandLandmarks } = results;
    const pose = poseFromLandmarks(
      { pose: poseLandmarks, face: faceLandmarks, leftHand: leftHandLandmarks, rightHand: rightHandLandmarks }, picture,
    );
    this.view.setBackdrop(results.image); // the one that was looked at, so mirrored where that is wanted
    this.status.textContent = pose.points === null ? "Nobody is in the picture" : "Following you";
    this.emit(pose);
  }
}

async function openCamera(): Promise<MediaStream> {
  // Browsers hide the camera from pages that came over plain HTTP from another machine.
  if (navigator.mediaDevices === undefined) throw new Error("The camera needs a page from localhost or over HTTPS");
  const video = { width: { ideal: 640 }, height: { ideal: 480 }, facingMode: "user" };
  return navigator.mediaDevices.getUserMedia({ video, audio: false });
}

/** Loads MediaPipe, which is a script of the old kind, and warms it up. */
async function loadTracker(onResults: (results: Results) => void): Promise<HolisticTracker> {
  if (window.Holistic === undefined) await loadScript(`${TRACKER_FOLDER}holistic.js`);
  const tracker = new (window.Holistic as typeof HolisticTracker)({ locateFile: (file) => TRACKER_FOLDER + file });
  tracker.setOptions({ modelComplexity: 0, smoothLandmarks: true, refineFaceLandmarks: false, enableSegmentation: false });
  tracker.onResults(onResults);
  await tracker.initialize();
  return tracker;
}

function loadScript(source: string): Promise<void> {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = source;
    script.onload = () => resolve();
    script.onerror = () => reject(new Error("This installation has no tracker for the camera"));
    document.head.append(script);
  });
}

function reason(error: unknown): string {
  if (!(error instanceof Error)) return "The tracker failed";
  if (error.name === "NotAllowedError") return "The camera was not allowed; allow it in the browser's address bar";
  if (error.name === "NotFoundError") return "There is no camera";
  if (error.name === "NotReadableError") return "The camera is in use by another program";
  return error.message;
}
