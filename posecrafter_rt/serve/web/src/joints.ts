// Posing by hand: people drag joints on the pose's canvas, or choose them and move them with the keyboard.
import { byId } from "./dom.ts";
import { toPicture } from "./geometry.ts";
import { moveJoint, nearestJoint } from "./kinematics.ts";
import { BODY, FACE, isVisible, keypointName, LEFT_HAND, NECK, RIGHT_HAND, type Pose, type Range } from "./layout.ts";
import type { PoseView } from "./stage.ts";

/** How close a pointer must be to a joint, in CSS pixels. Fingers are broad. */
const REACH_PX = { mouse: 16, pen: 20, touch: 28 };
const ARROWS: Record<string, readonly [number, number]> = {
  ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
};
/** An arrow key moves a joint by this fraction of the canvas's short side; with Shift, five times as far. */
const STEP = 1 / 100;
const LEAP = 5;
/** Without the feet, which are not drawn. */
const BODY_GROUPS: readonly (readonly [string, Range])[] = [
  ["Body", BODY], ["Face", FACE], ["Left hand", LEFT_HAND], ["Right hand", RIGHT_HAND],
];

export class JointEditor {
  private readonly panel = byId("joints-panel", HTMLDivElement);
  private readonly choice = byId("joint", HTMLSelectElement);
  private readonly place = byId("joint-place", HTMLOutputElement);
  private start: Pose | null = null;
  private pose: (Pose & { points: Float32Array }) | null = null;
  private isActive = false;
  /** The pointer that holds the selected joint. Browsers capture fingers unasked, so a capture alone proves nothing. */
  private holder: number | null = null;

  constructor(
    private readonly view: PoseView,
    private readonly emit: (pose: Pose) => void,
  ) {
    const { canvas } = view;
    canvas.onpointerdown = (event) => this.grab(event);
    canvas.onpointermove = (event) => this.drag(event);
    canvas.onlostpointercapture = (event) => {
      if (event.pointerId === this.holder) this.holder = null;
    };
    canvas.onkeydown = (event) => this.onKey(event);
    this.choice.onchange = () => this.select(this.selected);
    byId("joints-reset", HTMLButtonElement).onclick = () => this.reset();
  }

  /** Begin with this pose. If it is the same one as before, continue where editing stopped. */
  open(start: Pose): void {
    this.isActive = true;
    this.panel.hidden = false;
    this.view.canvas.tabIndex = 0;
    this.view.canvas.role = "application"; // else screen readers keep the arrow keys to themselves
    this.view.canvas.classList.add("is-editable");
    if (this.start !== start) {
      this.start = start;
      this.fillChoice(start.points as Float32Array);
      this.reset();
    } else if (this.pose !== null) {
      this.change(this.pose.points);
    }
    this.select(this.selected);
  }

  close(): void {
    this.isActive = false;
    this.panel.hidden = true;
    this.view.canvas.tabIndex = -1;
    this.view.canvas.role = "img";
    this.view.canvas.classList.remove("is-editable");
    this.view.mark(null);
  }

  private get selected(): number {
    return Number(this.choice.value);
  }

  private reset(): void {
    if (this.start !== null) this.change((this.start.points as Float32Array).slice());
  }

  private fillChoice(points: Float32Array): void {
    const groups = BODY_GROUPS.map(([label, { start, stop }]) => {
      const group = document.createElement("optgroup");
      group.label = label;
      for (let index = start; index < stop; index++) {
        if (isVisible(points, index)) group.append(new Option(keypointName(index), String(index)));
      }
      return group;
    });
    this.choice.replaceChildren(...groups.filter((group) => group.childElementCount > 0));
    if (isVisible(points, NECK)) this.choice.value = String(NECK);
  }

  private select(joint: number): void {
    this.choice.value = String(joint);
    this.view.mark(joint);
    this.tellPlace();
  }

  private grab(event: PointerEvent): void {
    if (!event.isPrimary || event.button !== 0) return;
    if (!this.isActive || this.pose === null || this.view.placement === null) return;
    const { x, y } = toPicture(this.view.placement, event.offsetX, event.offsetY);
    const reach = REACH_PX[event.pointerType as keyof typeof REACH_PX] ?? REACH_PX.mouse;
    const joint = nearestJoint(this.pose.points, x, y, reach / this.view.placement.scale);
    if (joint === null) return;
    this.select(joint);
    this.view.canvas.setPointerCapture(event.pointerId);
    this.holder = event.pointerId;
  }

  private drag(event: PointerEvent): void {
    if (!this.isActive || this.pose === null || this.view.placement === null) return;
    if (event.pointerId !== this.holder) return;
    const { x, y } = toPicture(this.view.placement, event.offsetX, event.offsetY);
    this.move(x, y);
  }

  private onKey(event: KeyboardEvent): void {
    const arrow = ARROWS[event.key];
    if (!this.isActive || this.pose === null || arrow === undefined) return;
    if (event.ctrlKey || event.metaKey || event.altKey) return; // a shortcut of the browser, such as Back
    event.preventDefault();
    const { canvas, points } = this.pose;
    const step = Math.min(canvas.height, canvas.width) * STEP * (event.shiftKey ? LEAP : 1);
    this.move(
      (points[this.selected * 3] as number) + arrow[0] * step, (points[this.selected * 3 + 1] as number) + arrow[1] * step,
    );
  }

  /** Move the selected joint to (x, y), clamped to the canvas. */
  private move(x: number, y: number): void {
    if (this.pose === null) return;
    const { canvas, points } = this.pose;
    const [inX, inY] = [Math.max(0, Math.min(x, canvas.width - 1)), Math.max(0, Math.min(y, canvas.height - 1))];
    this.change(moveJoint(points, this.selected, inX, inY));
  }

  private change(points: Float32Array): void {
    this.pose = { canvas: (this.start as Pose).canvas, points };
    this.emit(this.pose);
    this.tellPlace();
  }

  private tellPlace(): void {
    if (this.pose === null) return;
    const [x, y] = [0, 1].map((axis) => Math.round(this.pose?.points[this.selected * 3 + axis] as number));
    this.place.value = `${keypointName(this.selected)} at ${x}, ${y}`;
  }
}
