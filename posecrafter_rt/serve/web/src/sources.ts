// What drives the avatar: the demo, a file, the webcam or joints; one at a time.
import { byId } from "./dom.ts";
import { FilePicker } from "./files.ts";
import { JointEditor } from "./joints.ts";
import type { Pose } from "./layout.ts";
import { Player } from "./player.ts";
import type { PoseView } from "./stage.ts";
import { trackPose, type Track } from "./track.ts";
import { Webcam } from "./webcam.ts";

type Name = "demo" | "file" | "webcam" | "joints";
export type Fit = "person" | "canvas";

export class Sources {
  private readonly player: Player;
  private readonly editor: JointEditor;
  private readonly webcam: Webcam;
  private readonly files: FilePicker;
  private readonly demoPanel = byId("demo-panel", HTMLDivElement);
  private readonly fitRow = byId("fit-row", HTMLLabelElement);
  private readonly fitBox = byId("fit", HTMLInputElement);
  private name: Name = "demo";
  private demo: Track | null = null;
  private reference: Pose | null = null;
  private fromFile: Track | null = null;

  /** emit: a pose is to be shown; onChange: another source, or another fit, from the next pose on. */
  constructor(view: PoseView, emit: (pose: Pose) => void, private readonly onChange: () => void) {
    this.player = new Player(emit);
    this.editor = new JointEditor(view, emit);
    this.webcam = new Webcam(view, emit);
    this.files = new FilePicker(() => this.choose("file"), (track) => this.playFile(track));
    this.fitBox.onchange = onChange;
    for (const radio of radios()) radio.onchange = () => this.choose(radio.value as Name);
    document.addEventListener("keydown", (event) => this.onKey(event));
  }

  /** The poses are those of the avatar itself, or of somebody to be fitted to it. */
  get fit(): Fit {
    return this.isOfSomebody && this.fitBox.checked ? "person" : "canvas";
  }

  setVideosAllowed(areAllowed: boolean): void {
    this.files.setVideosAllowed(areAllowed);
  }

  /** The avatar's own poses are there: the demo begins, unless people have chosen something else. */
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
    this.player.stop();
    this.editor.close();
    this.webcam.close();
    this.files.close();
    this.fitRow.hidden = !this.isOfSomebody;
    this.onChange();
    this.begin();
  }

  private begin(): void {
    this.demoPanel.hidden = this.name !== "demo";
    if (this.name === "demo" && this.demo !== null) this.player.start(this.demo, "swing", !prefersStillness());
    if (this.name === "webcam") this.webcam.open();
    if (this.name === "joints" && this.reference !== null) this.editor.open(this.reference);
    if (this.name !== "file") return;
    this.files.open();
    if (this.fromFile !== null) this.player.start(this.fromFile, "loop", true);
  }

  private playFile(track: Track): void {
    this.fromFile = track;
    this.player.start(track, "loop", true);
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
