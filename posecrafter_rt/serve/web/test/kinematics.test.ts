import assert from "node:assert/strict";
import { test } from "node:test";
import { moveJoint, nearestJoint, PARENTS, subtree } from "../src/kinematics.ts";
import { FEET, LEFT_HAND, LEFT_SHOULDER, LEFT_WRIST, NECK, NOSE, NUM_KEYPOINTS, RIGHT_HAND, RIGHT_WRIST } from "../src/layout.ts";

const LEFT_ELBOW = 6;

function person(): Float32Array {
  const points = new Float32Array(NUM_KEYPOINTS * 3);
  for (let index = 0; index < NUM_KEYPOINTS; index++) points.set([100 + (index % 12), 50 + index, 1], index * 3);
  points.set([50, 50, 1], NECK * 3);
  points.set([70, 50, 1], LEFT_SHOULDER * 3);
  points.set([70, 80, 1], LEFT_ELBOW * 3);
  points.set([70, 110, 1], LEFT_WRIST * 3);
  points.set([70, 120, 1], (LEFT_HAND.start + 12) * 3);
  return points;
}

function place(points: Float32Array, index: number): number[] {
  return [...points.slice(index * 3, index * 3 + 2)].map((value) => Math.round(value * 1e3) / 1e3);
}

test("everything hangs on the neck, without a circle", () => {
  assert.equal(PARENTS[NECK], -1);
  assert.equal(new Set(subtree(NECK)).size, NUM_KEYPOINTS);
  assert.equal(subtree(NECK).length, NUM_KEYPOINTS);
});

test("a wrist carries its hand and no other, the nose the face", () => {
  assert.deepEqual(subtree(LEFT_WRIST).sort((a, b) => a - b), [LEFT_WRIST, ...Array.from({ length: 21 }, (_, i) => 92 + i)]);
  assert.ok(subtree(RIGHT_WRIST).every((index) => index === RIGHT_WRIST || index >= RIGHT_HAND.start));
  assert.equal(subtree(NOSE).length, 1 + 4 + 68);
});

test("moving the neck shifts the whole person", () => {
  const points = person();
  const moved = moveJoint(points, NECK, 53, 46);
  for (let index = 0; index < NUM_KEYPOINTS; index++) {
    assert.deepEqual(place(moved, index), [place(points, index)[0]! + 3, place(points, index)[1]! - 4]);
  }
});

test("an elbow that swings up turns the forearm and the hand with it", () => {
  const moved = moveJoint(person(), LEFT_ELBOW, 100, 50);
  assert.deepEqual(place(moved, LEFT_ELBOW), [100, 50]);
  assert.deepEqual(place(moved, LEFT_WRIST), [130, 50]);
  assert.deepEqual(place(moved, LEFT_HAND.start + 12), [140, 50]);
  assert.deepEqual(place(moved, LEFT_SHOULDER), [70, 50]);
});

test("missing points stay missing, and the given pose stays as it was", () => {
  const points = person();
  points.set([0, 0, 0], LEFT_WRIST * 3);
  const before = points.slice();
  const moved = moveJoint(points, LEFT_ELBOW, 90, 90);
  assert.deepEqual(points, before);
  assert.deepEqual([...moved.slice(LEFT_WRIST * 3, LEFT_WRIST * 3 + 3)], [0, 0, 0]);
});

test("without a parent, or with one at the same place, a joint only shifts", () => {
  for (const parent of [[0, 0, 0], [70, 80, 1]]) {
    const points = person();
    points.set(parent, LEFT_SHOULDER * 3);
    assert.deepEqual(place(moveJoint(points, LEFT_ELBOW, 80, 80), LEFT_WRIST), [80, 110]);
  }
});

test("the nearest joint is found within reach, the body's first", () => {
  const points = new Float32Array(NUM_KEYPOINTS * 3);
  points.set([10, 10, 1], NOSE * 3);
  points.set([13, 10, 1], 40 * 3);
  assert.equal(nearestJoint(points, 13, 10, 5), NOSE);
  assert.equal(nearestJoint(points, 13, 10, 2), 40);
  assert.equal(nearestJoint(points, 30, 30, 5), null);
});

test("what is not drawn cannot be grabbed: faint points and feet", () => {
  const points = new Float32Array(NUM_KEYPOINTS * 3);
  points.set([10, 10, 0.29], LEFT_WRIST * 3);
  points.set([10, 10, 1], FEET.start * 3);
  points.set([10, 10, 1], (FEET.stop - 1) * 3);
  assert.equal(nearestJoint(points, 10, 10, 5), null);
  points.set([13, 10, 0.3], LEFT_HAND.start * 3);
  assert.equal(nearestJoint(points, 10, 10, 5), LEFT_HAND.start);
});
