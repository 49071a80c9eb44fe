// Recording what the avatar shows; the server writes the file.
import { address } from "./api.ts";
import { byId, onClick, setEnabled } from "./dom.ts";
import type { RecordingState } from "./protocol.ts";

export class Recorder {
  private readonly button = byId("record", HTMLButtonElement);
  private readonly label = byId("record-label", HTMLSpanElement);
  private readonly link = byId("recording", HTMLAnchorElement);
  private isOn = false;
  private startedMs = 0;
  private timer: ReturnType<typeof setInterval> | undefined;

  constructor(
    ask: (isOn: boolean) => void,
    private readonly note: (text: string) => void,
  ) {
    onClick(this.button, () => {
      setEnabled(this.button, false); // until the server has answered
      ask(!this.isOn);
    });
  }

  /** Note whether there is a connection. A recording ends with it and is lost. */
  setLive(isLive: boolean): void {
    setEnabled(this.button, isLive);
    if (this.isOn) this.note("The recording is lost because the connection ended");
    this.setOn(false);
  }

  /** Show whether a recording runs. The url is that of a finished recording, even while the next one runs. */
  onState({ on, url, reason }: RecordingState): void {
    setEnabled(this.button, true);
    this.setOn(on);
    if (reason) this.note(`The recording has ended and can be saved: ${reason}`);
    if (url === null) return;
    this.link.href = address(url).href;
    this.link.hidden = false;
  }

  private setOn(isOn: boolean): void {
    if (isOn === this.isOn) return;
    this.isOn = isOn;
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
