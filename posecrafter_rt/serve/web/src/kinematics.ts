// The tree of joints, and moving a joint together with its descendants.
import {
  FACE, FEET, isVisible, LEFT_ANKLE, LEFT_HAND, LEFT_WRIST, NOSE, NUM_KEYPOINTS, RIGHT_ANKLE, RIGHT_HAND, RIGHT_WRIST,
} from "./layout.ts";

/** A bone shorter than this has no usable direction. */
const SHORTEST_BONE_PX = 1e-3;

/** The parent of each keypoint; the neck has none (-1). */
export const PARENTS: readonly number[] = Array.from({ length: NUM_KEYPOINTS }, (_, index) => parentOf(index));

function parentOf(index: number): number {
  if (index < FEET.start) return [1, -1, 1, 2, 3, 1, 5, 6, 1, 8, 9, 1, 11, 12, 0, 0, 14, 15][index] as number;
  if (index < FEET.stop) return index < FEET.start + 3 ? LEFT_ANKLE : RIGHT_ANKLE;
  if (index < FACE.stop) return NOSE;
  return index < LEFT_HAND.stop ? handParent(index, LEFT_HAND.start, LEFT_WRIST)
    : handParent(index, RIGHT_HAND.start, RIGHT_WRIST);
}

/** A hand's point 0 hangs on the wrist, the first point of each finger on point 0, any other on the one before it. */
function handParent(index: number, start: number, wrist: number): number {
  const point = index - start;
  if (point === 0) return wrist;
  return point % 4 === 1 ? start : index - 1;
}

/** Return a joint and all its descendants. */
export function subtree(joint: number): number[] {
  const found = [joint];
  for (const parent of found) {
    PARENTS.forEach((candidate, index) => {
      if (candidate === parent) found.push(index);
    });
  }
  return found;
}

/**
 * Move a joint. Its descendants move along and turn by the same angle as the joint's own bone.
 *
 * If the joint's parent is missing, they only shift, because there is no bone to give an angle.
 * points: (134, 3), not modified. Returns: a new array.
 */
export function moveJoint(points: Float32Array, joint: number, x: number, y: number): Float32Array {
  const moved = points.slice();
  const [fromX, fromY] = [points[joint * 3] as number, points[joint * 3 + 1] as number];
  const turn = boneTurn(points, joint, x, y);
  const [cos, sin] = [Math.cos(turn), Math.sin(turn)];
  for (const index of subtree(joint)) {
    if (points[index * 3 + 2] === 0) continue;
    const [dx, dy] = [(points[index * 3] as number) - fromX, (points[index * 3 + 1] as number) - fromY];
    moved[index * 3] = x + cos * dx - sin * dy;
    moved[index * 3 + 1] = y + sin * dx + cos * dy;
  }
  return moved;
}

/** Return the angle in radians by which a joint's bone turns when the joint moves to (x, y). */
function boneTurn(points: Float32Array, joint: number, x: number, y: number): number {
  const parent = PARENTS[joint] as number;
  if (parent < 0 || points[parent * 3 + 2] === 0) return 0;
  const [px, py] = [points[parent * 3] as number, points[parent * 3 + 1] as number];
  const [ax, ay] = [(points[joint * 3] as number) - px, (points[joint * 3 + 1] as number) - py];
  const [bx, by] = [x - px, y - py];
  if (Math.min(Math.hypot(ax, ay), Math.hypot(bx, by)) < SHORTEST_BONE_PX) return 0;
  return Math.atan2(ax * by - ay * bx, ax * bx + ay * by);
}

/** Return the drawn keypoint nearest to (x, y) within `reach` pixels, or null. The body's joints win over other points. */
export function nearestJoint(points: Float32Array, x: number, y: number, reach: number): number | null {
  return nearestWithin(points, x, y, reach, 0, FEET.start) ?? nearestWithin(points, x, y, reach, FEET.stop, NUM_KEYPOINTS);
}

function nearestWithin(
  points: Float32Array, x: number, y: number, reach: number, start: number, stop: number,
): number | null {
  let nearest: number | null = null;
  let distance = reach;
  for (let index = start; index < stop; index++) {
    if (!isVisible(points, index)) continue;
    const candidate = Math.hypot((points[index * 3] as number) - x, (points[index * 3 + 1] as number) - y);
    if (candidate <= distance) [nearest, distance] = [index, candidate];
  }
  return nearest;
}
