// Pose files and videos: chosen or dropped, sent to the server, which answers with their poses.
import { readPoses } from "./api.ts";
import { byId } from "./dom.ts";
import type { Track } from "./track.ts";

export class FilePicker {
  private readonly panel = byId("file-panel", HTMLDivElement);
  private readonly input = byId("file", HTMLInputElement);
  private readonly status = byId("file-status", HTMLParagraphElement);
  private reading: AbortController | null = null;

  /** onDrop: a file was dropped on the page, whatever was shown; onTrack: its poses are there. */
  constructor(onDrop: () => void, private readonly onTrack: (track: Track) => void) {
    this.input.onchange = () => {
      const file = this.input.files?.[0];
      if (file !== undefined) void this.read(file);
      this.input.value = ""; // so that the same file can be chosen again
    };
    this.acceptDrops(onDrop);
  }

  open(): void {
    this.panel.hidden = false;
  }

  close(): void {
    this.panel.hidden = true;
    this.reading?.abort();
  }

  /** Without pose extraction on the server's side, videos are of no use. */
  setVideosAllowed(areAllowed: boolean): void {
    this.input.accept = areAllowed ? ".json,application/json,video/*" : ".json,application/json";
    byId("file-kinds", HTMLSpanElement).textContent = areAllowed ? "OpenPose JSON or a video" : "OpenPose JSON";
  }

  private acceptDrops(onDrop: () => void): void {
    let depth = 0; // every element under the pointer enters and leaves by itself
    const mark = (change: number) => {
      depth += change;
      document.body.classList.toggle("is-dropping", depth > 0);
    };
    document.ondragenter = () => mark(1);
    document.ondragleave = () => mark(-1);
    document.ondragover = (event) => event.preventDefault();
    document.ondrop = (event) => {
      event.preventDefault();
      mark(-depth);
      const file = event.dataTransfer?.files[0];
      if (file === undefined) return;
      onDrop();
      void this.read(file);
    };
  }

  private async read(file: File): Promise<void> {
    this.reading?.abort();
    const reading = (this.reading = new AbortController());
    this.status.classList.remove("is-error");
    this.status.textContent = `Reading the poses of ${file.name}`;
    try {
      const track = await readPoses(file, reading.signal);
      this.status.textContent = `${file.name}: ${track.numFrames} ${track.numFrames === 1 ? "pose" : "poses"}`;
      this.onTrack(track);
    } catch (error) {
      if (reading.signal.aborted) return;
      this.status.classList.add("is-error");
      this.status.textContent = describe(error);
    }
  }
}

function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const hint = "hint" in error && typeof error.hint === "string" ? `: ${error.hint}` : "";
  return error.message + hint;
}
