// Plays a clip: the clock, and the bar with which people play, pause and seek.
import { byId, FrameLoop } from "./dom.ts";
import type { Clip, Repeat } from "./clip.ts";

/** After the display slept, poses must not jump. */
const LONGEST_STEP_MS = 100;

export class Player {
  private readonly bar = byId("player", HTMLDivElement);
  private readonly playButton = byId("play", HTMLButtonElement);
  private readonly scrubber = byId("scrub", HTMLInputElement);
  private readonly time = byId("time", HTMLOutputElement);
  private readonly repeatChoice = byId("repeat", HTMLSelectElement);
  private readonly speedChoice = byId("speed", HTMLSelectElement);
  private readonly loop = new FrameLoop((nowMs) => this.step(nowMs));
  private clip: Clip | null = null;
  private show: (index: number) => void = () => {};
  private lastMs: number | null = null;
  private shownIndex = -1;

  constructor() {
    this.playButton.onclick = () => this.toggle();
    this.scrubber.oninput = () => this.seek(Number(this.scrubber.value));
    this.repeatChoice.onchange = () => this.clip?.setRepeat(this.repeatChoice.value as Repeat);
    this.speedChoice.onchange = () => this.setSpeed();
  }

  /** Take over a clip as it is, at the chosen speed. show: called with each index that the clip reaches. */
  start(clip: Clip, show: (index: number) => void = () => {}): void {
    this.clip = clip;
    this.show = show;
    this.setSpeed();
    for (const option of this.repeatChoice.options) {
      option.hidden = option.disabled = !clip.repeats.includes(option.value as Repeat); // Safari lists hidden ones
    }
    this.repeatChoice.value = clip.repeat;
    this.scrubber.max = String(clip.numFrames - 1);
    this.bar.hidden = false;
    this.shownIndex = -1;
    this.lastMs = null;
    this.loop.start();
  }

  stop(): void {
    this.loop.stop();
    this.bar.hidden = true;
    this.clip = null;
  }

  /** Play or pause. Returns: whether there is anything to play. */
  toggle(): boolean {
    this.clip?.toggle();
    return this.clip !== null;
  }

  private seek(index: number): void {
    this.clip?.seek(index);
    this.shownIndex = -1;
  }

  private setSpeed(): void {
    if (this.clip !== null) this.clip.speed = Number(this.speedChoice.value);
  }

  private step(nowMs: number): void {
    const elapsedMs = this.lastMs === null ? 0 : Math.min(nowMs - this.lastMs, LONGEST_STEP_MS);
    this.lastMs = nowMs;
    const { clip } = this;
    if (clip === null) return;
    clip.advance(elapsedMs);
    this.showButton(clip.isPlaying);
    if (clip.index === this.shownIndex) return;
    this.shownIndex = clip.index;
    this.show(this.shownIndex);
    this.scrubber.value = String(this.shownIndex);
    this.time.value = `${seconds(this.shownIndex, clip)} / ${seconds(clip.numFrames, clip)} s`;
    this.scrubber.setAttribute("aria-valuetext", this.time.value);
  }

  private showButton(isPlaying: boolean): void {
    if (this.playButton.dataset["playing"] === String(isPlaying)) return;
    this.playButton.dataset["playing"] = String(isPlaying);
    this.playButton.title = isPlaying ? "Pause (Space)" : "Play (Space)";
    this.playButton.ariaLabel = isPlaying ? "Pause" : "Play";
  }
}

function seconds(frames: number, clip: Clip): string {
  return (frames / clip.fps).toFixed(1);
}
