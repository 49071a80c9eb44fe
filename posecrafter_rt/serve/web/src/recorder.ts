// Recording what the avatar shows; the server writes the file.
import { address, hasRecording } from "./api.ts";
import { byId, onClick, setEnabled } from "./dom.ts";
import type { RecordingState } from "./protocol.ts";

/** The server keeps this many finished recordings of a client. */
const MOST_KEPT = 4;

export class Recorder {
  private readonly button = byId("record", HTMLButtonElement);
  private readonly label = byId("record-label", HTMLSpanElement);
  private readonly note = byId("recording-note", HTMLParagraphElement);
  private readonly list = byId("recordings", HTMLSpanElement);
  private readonly links = new Map<string, HTMLAnchorElement>(); // by url, oldest first
  private numFinished = 0;
  private isOn = false;
  private startedMs = 0;
  private timer: ReturnType<typeof setInterval> | undefined;

  constructor(ask: (isOn: boolean) => void) {
    onClick(this.button, () => {
      setEnabled(this.button, false); // until the server has answered
      ask(!this.isOn);
    });
  }

  /** Note whether there is a connection. A recording ends with it and is lost. */
  setLive(isLive: boolean): void {
    setEnabled(this.button, isLive);
    if (this.isOn) this.note.textContent = "The recording is lost because the connection ended.";
    this.setOn(false);
    if (!isLive) return;
    for (const url of this.links.keys()) void this.withdrawIfGone(url);
  }

  /** Show whether a recording runs. The url is that of a finished recording, even while the next one runs. */
  onState({ on, url, reason }: RecordingState): void {
    setEnabled(this.button, true);
    this.setOn(on);
    if (reason) this.note.textContent = `The recording has ended and can be saved: ${reason}.`;
    if (url !== null && !this.links.has(url)) this.offer(url);
  }

  /** Offer to save a finished recording. Earlier ones that were not saved are still offered, if the server keeps them. */
  private offer(url: string): void {
    for (const [earlier, { dataset }] of this.links) {
      if (dataset["saved"] === "true" || this.links.size >= MOST_KEPT) this.withdraw(earlier);
    }
    const link = document.createElement("a");
    link.href = address(url).href;
    link.download = "";
    link.textContent = ++this.numFinished === 1 ? "Save recording" : `Save recording ${this.numFinished}`;
    link.onclick = () => (link.dataset["saved"] = "true");
    this.links.set(url, link);
    this.list.append(link);
  }

  private withdraw(url: string): void {
    this.links.get(url)?.remove();
    this.links.delete(url);
  }

  /** After a break, the server may have been started anew, which deletes its recordings. */
  private async withdrawIfGone(url: string): Promise<void> {
    if (!(await hasRecording(url))) this.withdraw(url);
  }

  private setOn(isOn: boolean): void {
    if (isOn === this.isOn) return;
    this.isOn = isOn;
    clearInterval(this.timer);
    this.button.ariaPressed = String(isOn);
    this.label.textContent = isOn ? "Stop 0:00" : "Record";
    if (!isOn) return;
    this.note.textContent = "";
    this.startedMs = performance.now();
    this.timer = setInterval(() => {
      const seconds = Math.floor((performance.now() - this.startedMs) / 1000);
      this.label.textContent = `Stop ${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    }, 500);
  }
}
