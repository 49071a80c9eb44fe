// Recording what the avatar shows; the server writes the file.
import { address } from "./api.ts";
import { byId } from "./dom.ts";
import type { RecordingState } from "./protocol.ts";

export class Recorder {
  private readonly button = byId("record", HTMLButtonElement);
  private readonly label = byId("record-label", HTMLSpanElement);
  private readonly link = byId("recording", HTMLAnchorElement);
  private startedMs = 0;
  private timer: ReturnType<typeof setInterval> | undefined;

  constructor(ask: (isOn: boolean) => void) {
    this.button.onclick = () => {
      this.button.disabled = true; // until the server has answered
      ask(this.button.ariaPressed !== "true");
    };
  }

  /** The connection is there or not; a recording ends with it. */
  setLive(isLive: boolean): void {
    this.button.disabled = !isLive;
    this.setOn(false);
  }

  onState({ on, url }: RecordingState): void {
    this.button.disabled = false;
    this.setOn(on);
    this.link.hidden = url === null;
    if (url !== null) this.link.href = address(url).href;
  }

  private setOn(isOn: boolean): void {
    clearInterval(this.timer);
    this.button.ariaPressed = String(isOn);
    this.label.textContent = isOn ? "Stop 0:00" : "Record";
    if (!isOn) return;
    this.startedMs = performance.now();
    this.timer = setInterval(() => {
      const seconds = Math.floor((performance.now() - this.startedMs) / 1000);
      this.label.textContent = `Stop ${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    }, 500);
  }
}
