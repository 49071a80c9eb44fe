// Playing a pose track: the clock, and the bar with which people play, pause and search.
import { byId, FrameLoop } from "./dom.ts";
import type { Pose } from "./layout.ts";
import { Playback, trackPose, type Repeat, type Track } from "./track.ts";

/** A display that slept must not make the track leap. */
const LONGEST_STEP_MS = 100;

export class Player {
  private readonly bar = byId("player", HTMLDivElement);
  private readonly playButton = byId("play", HTMLButtonElement);
  private readonly scrubber = byId("scrub", HTMLInputElement);
  private readonly time = byId("time", HTMLOutputElement);
  private readonly repeatChoice = byId("repeat", HTMLSelectElement);
  private readonly speedChoice = byId("speed", HTMLSelectElement);
  private readonly loop = new FrameLoop((nowMs) => this.step(nowMs));
  private track: Track | null = null;
  private playback = new Playback(1, 1);
  private lastMs: number | null = null;
  private shownIndex = -1;

  constructor(private readonly emit: (pose: Pose) => void) {
    this.playButton.onclick = () => this.toggle();
    this.scrubber.oninput = () => this.seek(Number(this.scrubber.value));
    this.repeatChoice.onchange = () => this.playback.setRepeat(this.repeatChoice.value as Repeat);
    this.speedChoice.onchange = () => (this.playback.speed = Number(this.speedChoice.value));
  }

  /** Take up a track from its first pose. */
  start(track: Track, repeat: Repeat, isPlaying: boolean): void {
    this.track = track;
    this.playback = new Playback(track.numFrames, track.fps);
    this.playback.isPlaying = isPlaying;
    this.playback.repeat = repeat;
    this.playback.speed = Number(this.speedChoice.value);
    this.repeatChoice.value = repeat;
    this.scrubber.max = String(track.numFrames - 1);
    this.bar.hidden = false;
    this.shownIndex = -1;
    this.lastMs = null;
    this.showButton();
    this.loop.start();
  }

  stop(): void {
    this.loop.stop();
    this.bar.hidden = true;
    this.track = null;
  }

  /** Play or pause. Returns: whether there is anything to play. */
  toggle(): boolean {
    if (this.track === null) return false;
    this.playback.toggle();
    this.showButton();
    return true;
  }

  private seek(index: number): void {
    this.playback.seek(index);
    this.shownIndex = -1;
  }

  private step(nowMs: number): void {
    const elapsedMs = this.lastMs === null ? 0 : Math.min(nowMs - this.lastMs, LONGEST_STEP_MS);
    this.lastMs = nowMs;
    this.playback.advance(elapsedMs);
    if (this.track === null || this.playback.index === this.shownIndex) return;
    this.shownIndex = this.playback.index;
    this.emit(trackPose(this.track, this.shownIndex));
    this.scrubber.value = String(this.shownIndex);
    this.time.value = `${seconds(this.shownIndex, this.track)} / ${seconds(this.track.numFrames, this.track)} s`;
    this.scrubber.setAttribute("aria-valuetext", this.time.value);
    this.showButton();
  }

  private showButton(): void {
    const isPlaying = this.playback.isPlaying;
    if (this.playButton.ariaPressed === String(isPlaying)) return;
    this.playButton.ariaPressed = String(isPlaying);
    this.playButton.title = isPlaying ? "Pause (Space)" : "Play (Space)";
    this.playButton.ariaLabel = isPlaying ? "Pause" : "Play";
  }
}

function seconds(frames: number, track: Track): string {
  return (frames / track.fps).toFixed(1);
}
