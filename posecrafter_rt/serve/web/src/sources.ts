// What drives the avatar: the demo, a file, the webcam or joints; one at a time.
import type { Repeat } from "./clip.ts";
import { byId } from "./dom.ts";
import { FilePicker } from "./files.ts";
import { JointEditor } from "./joints.ts";
import type { Pose } from "./layout.ts";
import { Player } from "./player.ts";
import type { PoseView } from "./stage.ts";
import { Playback, trackPose, type Track } from "./track.ts";
import { Tracker } from "./tracker.ts";
import { TrackedVideo } from "./video.ts";
import { Webcam } from "./webcam.ts";

type Name = "demo" | "file" | "webcam" | "joints";
export type Fit = "person" | "canvas";

export class Sources {
  private readonly player = new Player();
  private readonly editor: JointEditor;
  private readonly webcam: Webcam;
  private readonly video: TrackedVideo;
  private readonly files: FilePicker;
  private readonly demoPanel = byId("demo-panel", HTMLDivElement);
  private readonly fitRow = byId("fit-row", HTMLLabelElement);
  private readonly fitBox = byId("fit", HTMLInputElement);
  private name: Name = "demo";
  private demo: Track | null = null;
  private reference: Pose | null = null;
  private fromFile: Track | TrackedVideo | null = null;
  private last: Pose | null = null; // of the current source

  /** onPose: called with each pose to show. onChange: called when the next pose has another source or another fit. */
  constructor(
    view: PoseView,
    private readonly onPose: (pose: Pose) => void,
    private readonly onChange: () => void,
  ) {
    const tracker = new Tracker();
    const emit = (pose: Pose) => this.emit(pose);
    this.editor = new JointEditor(view, emit);
    this.webcam = new Webcam(view, tracker, emit, onChange);
    this.video = new TrackedVideo(view, tracker, {
      onPose: (pose) => {
        this.files.showPerson(pose.points !== null);
        emit(pose);
      },
      onProblem: (error) => {
        this.leaveFile();
        this.files.fail(error);
      },
    });
    this.files = new FilePicker({
      onDrop: () => this.choose("file"),
      onFile: () => this.leaveFile(),
      onTrack: (track) => this.playFile(track),
      loadVideo: (file, signal, onShown) => this.video.load(file, signal, onShown),
      onVideo: () => this.playFile(this.video),
    });
    this.fitBox.onchange = () => {
      onChange();
      if (this.last !== null) this.emit({ ...this.last }); // a copy, because the frame of a copy counts as not shown
    };
    for (const radio of radios()) radio.onchange = () => this.choose(radio.value as Name);
    document.addEventListener("keydown", (event) => this.onKey(event));
  }

  /** "person" if the poses are of somebody who is to be fitted to the avatar, else "canvas". */
  get fit(): Fit {
    return this.isOfSomebody && this.fitBox.checked ? "person" : "canvas";
  }

  /** Say whether the server can find poses in videos if this page cannot. */
  setServerReadsVideos(does: boolean): void {
    this.files.setServerReadsVideos(does);
  }

  /** Take the avatar's own poses. The demo or the joint editor begins, unless people have chosen another source. */
  setDemo(track: Track): void {
    this.demo = track;
    this.reference = firstPose(track);
    if (this.name === "demo" || this.name === "joints") this.begin();
  }

  private get isOfSomebody(): boolean {
    return this.name === "file" || this.name === "webcam";
  }

  private choose(name: Name): void {
    for (const radio of radios()) radio.checked = radio.value === name;
    this.name = name;
    this.last = null;
    this.player.stop();
    this.video.close();
    this.editor.close();
    this.webcam.close();
    this.files.close();
    this.fitRow.hidden = !this.isOfSomebody;
    this.onChange();
    this.begin();
  }

  private emit(pose: Pose): void {
    this.last = pose;
    this.onPose(pose);
  }

  private begin(): void {
    this.demoPanel.hidden = this.name !== "demo";
    if (this.name === "demo" && this.demo !== null) this.play(this.demo, "swing", !prefersStillness());
    if (this.name === "webcam") this.webcam.open();
    if (this.name === "joints" && this.reference !== null) this.editor.open(this.reference);
    if (this.name !== "file") return;
    this.files.open();
    if (this.fromFile !== null) this.playFile(this.fromFile);
  }

  /** Stop playing the file: another one was chosen, or this one is broken. */
  private leaveFile(): void {
    this.player.stop();
    this.video.close();
    this.fromFile = this.last = null;
    this.onChange();
  }

  private playFile(file: Track | TrackedVideo): void {
    this.fromFile = file;
    if (!(file instanceof TrackedVideo)) return this.play(file, "loop", true);
    this.player.start(file);
    file.open();
  }

  private play(track: Track, repeat: Repeat, isPlaying: boolean): void {
    const playback = new Playback(track.numFrames, track.fps);
    playback.repeat = repeat;
    playback.isPlaying = isPlaying;
    this.player.start(playback, (index) => this.emit(trackPose(track, index)));
  }

  /** Space plays and pauses, except where it has a meaning of its own. */
  private onKey(event: KeyboardEvent): void {
    const target = event.target as Element;
    if (event.key !== " " || target.matches("button, select, a, input:not([type=range])")) return;
    if (this.player.toggle()) event.preventDefault();
  }
}

function radios(): NodeListOf<HTMLInputElement> {
  return document.querySelectorAll<HTMLInputElement>("input[name=source]");
}

/** The first pose that shows somebody. */
function firstPose(track: Track): Pose | null {
  for (let index = 0; index < track.numFrames; index++) {
    const pose = trackPose(track, index);
    if (pose.points !== null) return pose;
  }
  return null;
}

function prefersStillness(): boolean {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}
