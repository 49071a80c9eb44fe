// From a pose to its frame on the screen: sending at the server's pace, decoding, and the figures about both.
import { byId } from "./dom.ts";
import type { Pose } from "./layout.ts";
import { Meter } from "./meter.ts";
import { FrameGate, Pacer } from "./pacing.ts";
import { encodePose, NO_PICTURE, type Frame } from "./protocol.ts";
import type { AvatarView } from "./stage.ts";

const FIGURES_EVERY_MS = 250;
/** A picture that comes later is not shown, as the server does not send it; a video's are the browser's to show. */
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
  /** The pose that was announced last: its frame is the video track's next picture, or soon follows. */
  private onVideoTrack: { sentMs: number; pose: Pose } | null = null;

  /** onLate: a frame came too late to be shown. */
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

  /** The avatar shall take this pose. */
  drive(pose: Pose): void {
    this.newest = pose;
    if (this.isLive && !this.isHeld) this.pacer.offer(pose);
  }

  /** The source changes: none of its poses so far is sent any more, and the next ones wait until `release`. */
  hold(): void {
    this.isHeld = true;
    this.newest = null;
    this.pacer.forget();
  }

  /** The server knows of the change. */
  release(): void {
    this.isHeld = false;
    if (this.isLive && this.newest !== null) this.pacer.offer(this.newest);
  }

  /**
   * A connection is there whose server works at so many poses at once, or (null) none is. Over a new one nothing is under
   * way, and the newest pose is told again.
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

  /** The last pose of all, as of a paused clip, is not left without its frame because that was too late, or lost. */
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
