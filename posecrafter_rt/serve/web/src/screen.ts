// Sends poses at the server's pace, decodes and shows their frames, and shows the figures about both.
import { byId } from "./dom.ts";
import type { Pose } from "./layout.ts";
import { Meter } from "./meter.ts";
import { FrameGate, Pacer } from "./pacing.ts";
import { encodePose, NO_PICTURE, type Frame } from "./protocol.ts";
import type { AvatarView } from "./stage.ts";

const FIGURES_EVERY_MS = 250;
/** A picture older than this is not shown; nor does the server send it. On a video track the browser decides. */
const MAX_AGE_MS = 1000;

export class Screen {
  private readonly pacer: Pacer;
  private readonly gate = new FrameGate();
  private readonly meter = new Meter();
  private readonly video = document.createElement("video");
  private readonly figures = {
    fps: byId("fps", HTMLElement), latency: byId("latency", HTMLElement), dropped: byId("dropped", HTMLElement),
  };
  private newest: Pose | null = null;
  /** The pose whose frame was shown last. */
  private shown: Pose | null = null;
  private isLive = false;
  private isHeld = false;
  private droppedByServer = 0;
  /** The pose that was announced last. Its frame is the video track's next picture, or follows soon. */
  private onVideoTrack: { sentMs: number; pose: Pose } | null = null;

  /** onLate: called when a frame came too late to be shown. */
  constructor(
    private readonly view: AvatarView,
    send: (bytes: ArrayBuffer) => void,
    private readonly onLate: () => void,
  ) {
    const now = () => performance.now();
    this.pacer = new Pacer((sent) => send(encodePose(sent.pose, sent.sequence, sent.sentMs)), now);
    this.video.muted = this.video.playsInline = true;
    setInterval(() => {
      this.showFigures();
      this.persist();
    }, FIGURES_EVERY_MS);
  }

  /** Make the avatar take this pose. */
  drive(pose: Pose): void {
    this.newest = pose;
    if (this.isLive && !this.isHeld) this.pacer.offer(pose);
  }

  /** Stop sending because the source changes: earlier poses are dropped, and the next ones wait until `release`. */
  hold(): void {
    this.isHeld = true;
    this.newest = null;
    this.pacer.forget();
  }

  /** Send again: the server knows of the change. */
  release(): void {
    this.isHeld = false;
    if (this.isLive && this.newest !== null) this.pacer.offer(this.newest);
  }

  /**
   * Note a new connection to a server that works on `inFlight` poses at once, or (null) that there is none.
   * On a new one nothing is under way, and the newest pose is sent again.
   */
  setLive(inFlight: number | null): void {
    this.isLive = inFlight !== null;
    this.pacer.restart(inFlight ?? 1);
    this.meter.clear();
    this.gate.late = 0;
    this.droppedByServer = 0;
    if (this.isLive && !this.isHeld && this.newest !== null) this.pacer.offer(this.newest);
  }

  async onFrame(frame: Frame): Promise<void> {
    const sent = this.pacer.acknowledge(frame.sequence, frame.waitMs, frame.renderMs);
    this.droppedByServer = frame.dropped;
    if (frame.format === NO_PICTURE) {
      if (sent !== null) {
        this.onVideoTrack = sent;
        this.shown = sent.pose;
      }
      return;
    }
    const image = await createImageBitmap(new Blob([frame.picture], { type: "image/jpeg" }));
    const now = performance.now();
    const isLate = now - frame.sentMs > MAX_AGE_MS;
    if (isLate) this.onLate();
    if (this.gate.admit(frame.sequence, isLate)) {
      this.view.show(image, frame.size, sent?.pose ?? null);
      if (sent !== null) this.shown = sent.pose;
      this.meter.add(now, now - frame.sentMs);
    }
    image.close();
  }

  /** Show a video track's frames from now on, or none. */
  onVideo(stream: MediaStream | null): void {
    this.video.srcObject = stream;
    this.onVideoTrack = null;
    if (stream === null) return;
    void this.video.play();
    const step = () => {
      if (this.video.srcObject !== stream) return;
      this.video.requestVideoFrameCallback(step);
      const size = { height: this.video.videoHeight, width: this.video.videoWidth };
      const shown = this.onVideoTrack;
      this.onVideoTrack = null;
      this.view.show(this.video, size, shown?.pose ?? null);
      const now = performance.now();
      if (shown !== null) this.meter.add(now, now - shown.sentMs);
    };
    this.video.requestVideoFrameCallback(step);
  }

  /** Send the newest pose again if its frame was late or lost: in a paused clip, for example, no other pose follows. */
  private persist(): void {
    if (this.isLive && !this.isHeld && this.newest !== null && this.newest !== this.shown) this.pacer.offerAgain(this.newest);
  }

  private showFigures(): void {
    const read = this.meter.read(performance.now());
    const { fps, latency, dropped } = this.figures;
    fps.textContent = read === null ? "–" : read.fps.toFixed(read.fps < 10 ? 1 : 0);
    latency.textContent = read === null ? "–" : `${Math.round(read.latencyMs)} ms`;
    dropped.textContent = String(this.pacer.overtaken + this.gate.late + this.droppedByServer);
  }
}
