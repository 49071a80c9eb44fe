// What the player bar plays: a pose track or a video.

export type Repeat = "swing" | "loop" | "once";

export interface Clip {
  readonly numFrames: number;
  readonly fps: number;
  /** The repeat modes that the clip supports. */
  readonly repeats: readonly Repeat[];
  readonly index: number;
  readonly isPlaying: boolean;
  readonly repeat: Repeat;
  speed: number;
  /** Advance by `elapsedMs`. */
  advance(elapsedMs: number): void;
  /** Play or pause. If the end was reached, playing begins at the start. */
  toggle(): void;
  seek(index: number): void;
  setRepeat(repeat: Repeat): void;
}
