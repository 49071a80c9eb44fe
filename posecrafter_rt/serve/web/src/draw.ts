// The stick figure, drawn like ControlNet's openpose pictures; see posecrafter_rt/poses/draw.py.
import type { Placement } from "./geometry.ts";
import {
  BODY, COLOURS, FACE, HAND_EDGES, isVisible, LEFT_HAND, LIMBS, RIGHT_HAND, type Pose, type Range,
} from "./layout.ts";

/** The widths below apply to a picture whose short side has this many pixels. */
const SHORT_SIDE_PX = 512;
const STICK_WIDTH_PX = 4;
const DOT_PX = 4;
const FACE_DOT_PX = 3;
const HAND_LINE_PX = 2;
const LIMB_DIMMING = 0.6;
const HAND_DOT_COLOUR = "rgb(0 0 255)";
const FACE_DOT_COLOUR = "rgb(255 255 255)";

interface Pen {
  context: CanvasRenderingContext2D;
  points: Float32Array;
  placement: Placement;
  /** The size of one pixel of the picture to which the widths apply. */
  unit: number;
}

/** Paint a pose at the placement of its canvas. Feet are not drawn. */
export function drawPose(context: CanvasRenderingContext2D, pose: Pose, placement: Placement): void {
  if (pose.points === null) return;
  const shortSide = Math.min(pose.canvas.height, pose.canvas.width) * placement.scale;
  const pen = { context, points: pose.points, placement, unit: shortSide / SHORT_SIDE_PX };
  drawBody(pen);
  drawHand(pen, LEFT_HAND);
  drawHand(pen, RIGHT_HAND);
  for (let index = FACE.start; index < FACE.stop; index++) drawDot(pen, index, FACE_DOT_PX, FACE_DOT_COLOUR);
}

/** Mark a keypoint with a ring. */
export function drawRing(
  context: CanvasRenderingContext2D, points: Float32Array, index: number, placement: Placement, radius: number,
): void {
  const [x, y] = at({ points, placement }, index);
  context.lineWidth = radius / 4;
  context.strokeStyle = "white";
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.stroke();
}

function at({ points, placement }: Pick<Pen, "points" | "placement">, index: number): [number, number] {
  const [x, y] = [points[index * 3] as number, points[index * 3 + 1] as number];
  return [placement.left + (x + 0.5) * placement.scale, placement.top + (y + 0.5) * placement.scale];
}

function drawBody(pen: Pen): void {
  LIMBS.forEach(([start, end], limb) => drawStick(pen, start, end, rgb(limb, LIMB_DIMMING)));
  for (let index = BODY.start; index < BODY.stop; index++) drawDot(pen, index, DOT_PX, rgb(index, 1));
}

function rgb(index: number, dimming: number): string {
  return `rgb(${COLOURS[index]?.map((value) => Math.trunc(value * dimming)).join(" ")})`;
}

function drawStick(pen: Pen, start: number, end: number, colour: string): void {
  if (!isVisible(pen.points, start) || !isVisible(pen.points, end)) return;
  const [[x0, y0], [x1, y1]] = [at(pen, start), at(pen, end)];
  const angle = Math.atan2(y1 - y0, x1 - x0);
  const { context } = pen;
  context.fillStyle = colour;
  context.beginPath();
  context.ellipse(
    (x0 + x1) / 2, (y0 + y1) / 2, Math.hypot(x1 - x0, y1 - y0) / 2, STICK_WIDTH_PX * pen.unit, angle, 0, 2 * Math.PI,
  );
  context.fill();
}

function drawDot(pen: Pen, index: number, radiusPx: number, colour: string): void {
  if (!isVisible(pen.points, index)) return;
  const [x, y] = at(pen, index);
  pen.context.fillStyle = colour;
  pen.context.beginPath();
  pen.context.arc(x, y, radiusPx * pen.unit, 0, 2 * Math.PI);
  pen.context.fill();
}

function drawHand(pen: Pen, hand: Range): void {
  const { context, unit } = pen;
  context.lineWidth = HAND_LINE_PX * unit;
  HAND_EDGES.forEach(([start, end], edge) => {
    const [from, to] = [hand.start + start, hand.start + end];
    if (!isVisible(pen.points, from) || !isVisible(pen.points, to)) return;
    context.strokeStyle = `hsl(${edge * 18} 100% 50%)`;
    context.beginPath();
    context.moveTo(...at(pen, from));
    context.lineTo(...at(pen, to));
    context.stroke();
  });
  for (let index = hand.start; index < hand.stop; index++) drawDot(pen, index, DOT_PX, HAND_DOT_COLOUR);
}
