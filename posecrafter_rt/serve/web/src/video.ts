// Plays a video file and tracks the person in it. Both happen in the page; only keypoints leave it.
import type { Clip, Repeat } from "./clip.ts";
import type { Pose } from "./layout.ts";
import type { PoseView } from "./stage.ts";
import type { Tracker } from "./tracker.ts";

/** Later than any video's end. Seeking there makes a browser find an end that the file does not state. */
const BEYOND_S = 1e9;

/** The browser cannot play a file. */
export class Unplayable extends Error {}

export interface VideoEvents {
  onPose(pose: Pose): void;
  /** The video was playing, and cannot be played any further. */
  onProblem(error: unknown): void;
}

export class TrackedVideo implements Clip {
  readonly fps = 25; // of the places to seek to; browsers do not tell a video's own rate
  readonly repeats: readonly Repeat[] = ["loop", "once"];
  private readonly video = document.createElement("video");
  private isOpen = false;
  private isWanted = false; // people want it to play; it may be waiting for the tracker
  private isNew = false; // the tracker has not seen the current picture

  constructor(
    private readonly view: PoseView,
    private readonly tracker: Tracker,
    private readonly events: VideoEvents,
  ) {
    this.video.muted = this.video.playsInline = true;
    this.video.preload = "auto";
    this.video.onended = () => (this.isWanted = false);
    this.video.onerror = () => {
      if (!this.isOpen) return; // load() throws this error
      this.close();
      this.events.onProblem(new Unplayable("The video is broken from here on"));
    };
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) this.video.pause(); // else it plays on although nothing is tracked then
    });
    this.watch();
  }

  /** Show a file's first picture and load the tracker. Throws Unplayable, NoTracker, or the reason of an abort. */
  async load(file: File, signal: AbortSignal, onShown: () => void): Promise<void> {
    this.close();
    URL.revokeObjectURL(this.video.src);
    this.video.src = URL.createObjectURL(file);
    this.video.load(); // else iPhones load no picture before the video plays
    this.video.loop = true;
    await this.event("loadeddata", signal, `This browser cannot play ${file.name}`);
    if (this.video.videoWidth === 0) throw new Unplayable(`There are no pictures in ${file.name}`);
    if (!Number.isFinite(this.video.duration)) await this.findEnd(signal);
    signal.throwIfAborted();
    this.view.setBackdrop(this.video);
    this.view.show({ canvas: this.size, points: null });
    onShown();
    await this.tracker.load();
    signal.throwIfAborted();
  }

  /** Play the loaded file from its current place. */
  open(): void {
    this.isOpen = true;
    this.setPlaying(true);
  }

  /** Stop, and clear the view. */
  close(): void {
    this.isOpen = false;
    this.setPlaying(false);
    this.view.setBackdrop(null);
  }

  get numFrames(): number {
    return Math.max(1, Math.round(this.video.duration * this.fps));
  }

  get index(): number {
    return Math.min(Math.floor(this.video.currentTime * this.fps + 1e-6), this.numFrames - 1);
  }

  get isPlaying(): boolean {
    return this.isWanted;
  }

  get repeat(): Repeat {
    return this.video.loop ? "loop" : "once";
  }

  setRepeat(repeat: Repeat): void {
    this.video.loop = repeat === "loop";
  }

  get speed(): number {
    return this.video.playbackRate;
  }

  set speed(speed: number) {
    this.video.playbackRate = speed;
  }

  toggle(): void {
    this.setPlaying(!this.isWanted);
  }

  seek(index: number): void {
    this.video.currentTime = index / this.fps;
  }

  /** Track a new picture. The video plays by itself, but waits for a slow tracker, which would miss most of it. */
  advance(): void {
    if (!this.isOpen || this.tracker.isBusy) return;
    if (this.isNew) void this.track();
    else if (this.isWanted && this.video.paused && !this.video.ended) void this.play();
  }

  private get size(): Pose["canvas"] {
    return { height: this.video.videoHeight, width: this.video.videoWidth };
  }

  private setPlaying(isWanted: boolean): void {
    this.isWanted = isWanted;
    if (isWanted) void this.play();
    else this.video.pause();
  }

  private async play(): Promise<void> {
    if (document.hidden) return; // advance() plays it once the page is seen
    try {
      await this.video.play();
    } catch (error) {
      // A pause before playing began is no failure.
      if (this.isOpen && !(error instanceof Error && error.name === "AbortError")) this.events.onProblem(error);
    }
  }

  /** Mark every picture that the video shows as new, playing or not. */
  private watch(): void {
    this.video.requestVideoFrameCallback(() => {
      this.isNew = true;
      this.watch();
    });
  }

  private async track(): Promise<void> {
    this.isNew = false;
    if (this.tracker.isSlow) this.video.pause();
    const { src } = this.video;
    try {
      const found = await this.tracker.find(this.video, false);
      if (found === null || !this.isOpen || this.video.src !== src) return;
      this.view.setBackdrop(found.picture);
      this.events.onPose(found.pose);
    } catch (error) {
      if (!this.isOpen || this.video.src !== src) return;
      this.close();
      this.events.onProblem(error);
    }
  }

  /** Find the end of a recording that does not state its length. */
  private async findEnd(signal: AbortSignal): Promise<void> {
    for (const time of [BEYOND_S, 0]) {
      this.video.currentTime = time;
      await this.event("seeked", signal, "The video has no end that can be found");
    }
  }

  /** Wait for an event of the video. Throws Unplayable(failure) on an error, or the reason of an abort. */
  private event(name: "loadeddata" | "seeked", signal: AbortSignal, failure: string): Promise<void> {
    return new Promise((resolve, reject) => {
      const over = new AbortController();
      const settle = (act: () => void) => () => {
        over.abort();
        act();
      };
      const options = { signal: over.signal };
      this.video.addEventListener(name, settle(resolve), options);
      this.video.addEventListener("error", settle(() => reject(new Unplayable(failure))), options);
      signal.addEventListener("abort", settle(() => reject(signal.reason as Error)), options);
    });
  }
}
