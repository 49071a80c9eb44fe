// Pose files and videos that people choose or drop. The server reads pose files; the page plays videos.
import { readPoses } from "./api.ts";
import { byId, setText } from "./dom.ts";
import type { Track } from "./track.ts";
import { NoTracker } from "./tracker.ts";
import { Unplayable } from "./video.ts";

export interface FileEvents {
  /** A file was dropped on the page, whichever source was shown. */
  onDrop(): void;
  /** Another file was taken; the last one stops playing. */
  onFile(): void;
  /** The server has read the poses of a file. */
  onTrack(track: Track): void;
  /** Make a video ready; calls `onShown` once its first picture is shown. Throws an error that says what is wrong. */
  loadVideo(file: File, signal: AbortSignal, onShown: () => void): Promise<void>;
  /** The video is ready. */
  onVideo(): void;
}

export class FilePicker {
  private readonly panel = byId("file-panel", HTMLDivElement);
  private readonly input = byId("file", HTMLInputElement);
  private readonly status = byId("file-status", HTMLParagraphElement);
  private readonly help = byId("file-help", HTMLDivElement);
  private readonly command = byId("file-command", HTMLElement);
  private readonly sendButton = byId("file-send", HTMLButtonElement);
  private reading: AbortController | null = null;
  private file: File | null = null;

  constructor(private readonly events: FileEvents) {
    this.input.onchange = () => {
      const file = this.input.files?.[0];
      if (file !== undefined) void this.take(file);
      this.input.value = ""; // so that the same file can be chosen again
    };
    this.sendButton.onclick = () => {
      if (this.file !== null) void this.read(this.file, (file, signal) => this.readPoses(file, "video/mp4", signal));
    };
    this.acceptDrops();
  }

  open(): void {
    this.panel.hidden = false;
  }

  close(): void {
    this.panel.hidden = true;
    if (this.reading === null) return;
    this.reading.abort();
    this.reading = null;
    this.status.textContent = "";
  }

  /** Say whether the server can find poses in videos. It gets the pictures, so it is asked only if people say so. */
  setServerReadsVideos(does: boolean): void {
    this.sendButton.hidden = !does;
  }

  /** Say whether the tracker finds a person in the video. */
  showPerson(isSomebody: boolean): void {
    setText(this.status, `${this.file?.name}: ${isSomebody ? "following the person" : "nobody is in the picture"}`);
  }

  /** Say why the file cannot be played, and what to do. */
  fail(error: unknown): void {
    this.status.classList.add("is-error");
    this.status.textContent = describe(error);
    if (this.file === null || !(error instanceof Unplayable || error instanceof NoTracker)) return;
    const { name } = this.file;
    this.command.textContent = `posecrafter-rt poses extract ${word(name)} -o ${word(`${name.replace(/\.[^.]*$/, "")}.json`)}`;
    this.help.hidden = false;
  }

  private acceptDrops(): void {
    let depth = 0; // every element under the pointer has its own enter and leave events
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
      this.events.onDrop();
      void this.take(file);
    };
  }

  private take(file: File): Promise<void> {
    return this.read(file, (chosen, signal) =>
      isPoseFile(chosen) ? this.readPoses(chosen, "application/json", signal) : this.loadVideo(chosen, signal));
  }

  /** Read a file with `way`, unless the next file comes first. */
  private async read(file: File, way: (file: File, signal: AbortSignal) => Promise<void>): Promise<void> {
    this.reading?.abort();
    const reading = (this.reading = new AbortController());
    this.file = file;
    this.events.onFile();
    this.status.classList.remove("is-error");
    this.help.hidden = true;
    try {
      await way(file, reading.signal);
    } catch (error) {
      if (!reading.signal.aborted) this.fail(error);
    }
    if (this.reading === reading) this.reading = null;
  }

  private async readPoses(file: File, type: "application/json" | "video/mp4", signal: AbortSignal): Promise<void> {
    this.status.textContent = `Reading the poses of ${file.name}`;
    const track = await readPoses(file, type, signal);
    this.status.textContent = `${file.name}: ${track.numFrames} ${track.numFrames === 1 ? "pose" : "poses"}`;
    this.events.onTrack(track);
  }

  private async loadVideo(file: File, signal: AbortSignal): Promise<void> {
    if (file.type !== "" && !file.type.startsWith("video/")) {
      throw new Error(`${file.name} is neither OpenPose JSON nor a video`);
    }
    this.status.textContent = `Opening ${file.name}`;
    await this.events.loadVideo(file, signal, () => {
      this.status.textContent = `${file.name}: loading the tracker, which takes a while at first`;
    });
    this.status.textContent = `${file.name}: looking for the person`;
    this.events.onVideo();
  }
}

function isPoseFile(file: File): boolean {
  return file.type === "application/json" || file.name.toLowerCase().endsWith(".json");
}

/** Return a file's name as one word of a shell command. */
function word(name: string): string {
  return /^[\w.,+@%/-]+$/.test(name) && !name.startsWith("-") ? name : `'./${name.replaceAll("'", `'\\''`)}'`;
}

function describe(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const hint = "hint" in error && typeof error.hint === "string" ? `: ${error.hint}` : "";
  return error.message + hint;
}
