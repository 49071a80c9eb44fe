// What the bar plays: the poses of a file, or a video.

export type Repeat = "swing" | "loop" | "once";

export interface Clip {
  readonly numFrames: number;
  readonly fps: number;
  /** The ways of repeating that it knows. */
  readonly repeats: readonly Repeat[];
  readonly index: number;
  readonly isPlaying: boolean;
  readonly repeat: Repeat;
  speed: number;
  /** So much time has passed. */
  advance(elapsedMs: number): void;
  /** Play, from the start if the end was reached; or pause. */
  toggle(): void;
  seek(index: number): void;
  setRepeat(repeat: Repeat): void;
}
