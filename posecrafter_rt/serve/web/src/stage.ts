// The two pictures: the pose that is sent and the avatar that comes back.
import { drawPose, drawRing } from "./draw.ts";
import { contain, cover, type Placement } from "./geometry.ts";
import type { Pose, Size } from "./layout.ts";

const BACKDROP_OPACITY = 0.45;

/** Shows a pose at the screen's resolution, over the camera's or video's picture if there is one. */
export class PoseView {
  private readonly context: CanvasRenderingContext2D;
  private pose: Pose | null = null;
  private frame: Size | null = null;
  private backdrop: CanvasImageSource | null = null;
  private marked: number | null = null;

  constructor(readonly canvas: HTMLCanvasElement) {
    this.context = canvas.getContext("2d") as CanvasRenderingContext2D;
    new ResizeObserver(() => {
      canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
      canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
      this.paint();
    }).observe(canvas);
  }

  /** frame: a centred picture that the pose's canvas is scaled to cover, as on the avatar; null: show all of it. */
  show(pose: Pose, frame: Size | null = null): void {
    this.pose = pose;
    this.frame = frame;
    this.paint();
  }

  /** Paint this picture, dimmed, behind the next pose, which was found in it; null: none from now on. */
  setBackdrop(image: CanvasImageSource | null): void {
    this.backdrop = image;
    if (image === null) this.paint();
  }

  /** Draw a ring around a keypoint; null: around none. */
  mark(joint: number | null): void {
    this.marked = joint;
    this.paint();
  }

  /** Where the pose's canvas lies within this view's canvas, in CSS pixels; null before the first pose. */
  get placement(): Placement | null {
    const box = { width: this.canvas.clientWidth, height: this.canvas.clientHeight };
    return this.pose === null ? null : this.place(this.pose.canvas, box);
  }

  private place(canvas: Size, box: Size): Placement {
    return this.frame === null ? contain(canvas, box) : cover(canvas, this.frame, contain(this.frame, box));
  }

  private paint(): void {
    const { context, pose } = this;
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (pose === null) return;
    const placement = this.place(pose.canvas, this.canvas);
    if (this.backdrop !== null) this.paintBackdrop(this.backdrop, pose.canvas, placement);
    drawPose(context, pose, placement);
    if (this.marked !== null && pose.points !== null) {
      drawRing(context, pose.points, this.marked, placement, 9 * devicePixelRatio);
    }
  }

  private paintBackdrop(image: CanvasImageSource, size: Size, { left, top, scale }: Placement): void {
    this.context.globalAlpha = BACKDROP_OPACITY;
    this.context.drawImage(image, left, top, size.width * scale, size.height * scale);
    this.context.globalAlpha = 1;
  }
}

/** Shows the avatar's newest frame, which the browser enlarges, and the frame's pose over it if people want that. */
export class AvatarView {
  private pose: Pose | null = null;
  private hasOverlay = false;
  private readonly context: CanvasRenderingContext2D;

  constructor(
    private readonly canvas: HTMLCanvasElement,
    private readonly overlay: PoseView,
  ) {
    this.context = canvas.getContext("2d") as CanvasRenderingContext2D;
    overlay.canvas.hidden = true;
  }

  /** Show a frame. pose: the pose that it shows; null: the same one as before. */
  show(image: CanvasImageSource, { height, width }: Size, pose: Pose | null): void {
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    this.context.drawImage(image, 0, 0, width, height);
    if (pose === null) return;
    this.pose = pose;
    this.showPose();
  }

  setOverlay(isOn: boolean): void {
    this.hasOverlay = isOn;
    this.showPose();
  }

  /** Forget the shown pose: the next frames show other poses, or poses that are fitted in another way. */
  forgetPose(): void {
    this.pose = null;
    this.showPose();
  }

  private showPose(): void {
    this.overlay.canvas.hidden = !this.hasOverlay || this.pose === null;
    if (this.hasOverlay && this.pose !== null) this.overlay.show(this.pose, this.canvas);
  }
}
