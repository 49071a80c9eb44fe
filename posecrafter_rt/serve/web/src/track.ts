// Pose tracks (a few seconds of poses each), and the place in one while it plays.
import type { Clip, Repeat } from "./clip.ts";
import { NUM_KEYPOINTS, type Pose, type Size } from "./layout.ts";

export interface Track {
  fps: number;
  canvas: Size;
  numFrames: number;
  points: Float32Array;
}

/** Decode a track from the server's JSON. Throws an Error if its parts do not fit together. */
export function decodeTrack(json: { fps: number; canvas: [number, number]; num_frames: number; keypoints: string }): Track {
  const bytes = Uint8Array.from(atob(json.keypoints), (character) => character.charCodeAt(0));
  const points = new Float32Array(bytes.buffer);
  if (json.num_frames < 1 || points.length !== json.num_frames * NUM_KEYPOINTS * 3) {
    throw new Error(`a pose track of ${json.num_frames} frames with ${points.length} numbers`);
  }
  const [height, width] = json.canvas;
  return { fps: json.fps, canvas: { height, width }, numFrames: json.num_frames, points };
}

/** Return one frame of a track. Nobody is seen if every confidence is 0. */
export function trackPose(track: Track, index: number): Pose {
  const length = NUM_KEYPOINTS * 3;
  const points = track.points.subarray(index * length, (index + 1) * length);
  const isSomebody = points.some((value, position) => position % 3 === 2 && value > 0);
  return { canvas: track.canvas, points: isSomebody ? points : null };
}

/** The current place in a track that plays. It has no clock: `advance` tells it how much time has passed. */
export class Playback implements Clip {
  readonly repeats: readonly Repeat[] = ["swing", "loop", "once"];
  isPlaying = false;
  repeat: Repeat = "loop";
  speed = 1;
  private phase = 0; // frames played; for "swing" there and back again

  constructor(
    readonly numFrames: number,
    readonly fps: number,
  ) {}

  get index(): number {
    const last = this.numFrames - 1;
    const whole = Math.floor(this.phase);
    if (this.repeat !== "swing" || last === 0) return Math.min(whole, last);
    const turn = whole % (2 * last);
    return turn <= last ? turn : 2 * last - turn;
  }

  /** Advance by `elapsedMs`. A track that is played once stops at its end. */
  advance(elapsedMs: number): void {
    if (!this.isPlaying) return;
    this.phase += (elapsedMs / 1000) * this.fps * this.speed;
    if (this.repeat === "loop") this.phase %= this.numFrames;
    else if (this.repeat === "swing") this.phase %= Math.max(2 * (this.numFrames - 1), 1);
    else if (this.phase >= this.numFrames) {
      this.phase = this.numFrames - 1;
      this.isPlaying = false;
    }
  }

  /** Play or pause. If the end was reached, playing begins at the start. */
  toggle(): void {
    this.isPlaying = !this.isPlaying;
    if (this.isPlaying && this.repeat === "once" && this.index === this.numFrames - 1) this.phase = 0;
  }

  seek(index: number): void {
    this.phase = Math.max(0, Math.min(index, this.numFrames - 1));
  }

  setRepeat(repeat: Repeat): void {
    this.phase = this.index;
    this.repeat = repeat;
  }
}
