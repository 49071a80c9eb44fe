import assert from "node:assert/strict";
import { test } from "node:test";
import { poseFromLandmarks, type Landmark } from "../src/landmarks.ts";
import { FACE, LEFT_HAND, LEFT_SHOULDER, NECK, NOSE, RIGHT_HAND, RIGHT_SHOULDER } from "../src/layout.ts";

const PICTURE = { height: 100, width: 200 };

function landmarks(count: number, visibility?: number): Landmark[] {
  return Array.from({ length: count }, (_, index) => ({ x: (index + 0.5) / (count + 1), y: 0.25, visibility }));
}

function point(points: Float32Array, index: number): number[] {
  return [...points.slice(index * 3, index * 3 + 3)].map((value) => Math.round(value * 1e3) / 1e3);
}

function x(index: number, count: number): number {
  return Math.round((((index + 0.5) / (count + 1)) * 200 - 0.5) * 1e3) / 1e3;
}

test("every part goes to its place", () => {
  const found = { pose: landmarks(33, 0.75), face: landmarks(468), leftHand: landmarks(21), rightHand: landmarks(21) };
  const points = poseFromLandmarks(found, PICTURE).points as Float32Array;
  assert.deepEqual(point(points, NOSE), [x(0, 33), 24.5, 0.75]);
  assert.deepEqual(point(points, RIGHT_SHOULDER), [x(12, 33), 24.5, 0.75]);
  assert.deepEqual(point(points, FACE.start + 8), [x(152, 468), 24.5, 1]); // the chin
  assert.deepEqual(point(points, LEFT_HAND.start + 4), [x(4, 21), 24.5, 1]);
  assert.deepEqual(point(points, RIGHT_HAND.start + 20), [x(20, 21), 24.5, 1]);
  assert.deepEqual(point(points, 19), [0, 0, 0]); // BlazePose has no small toe
});

test("the neck is the shoulders' middle, as sure as the less sure of them", () => {
  const pose = landmarks(33, 0.9);
  Object.assign(pose[11] as Landmark, { x: 0.7, y: 0.5, visibility: 0.4 });
  Object.assign(pose[12] as Landmark, { x: 0.3, y: 0.7 });
  const points = poseFromLandmarks({ pose }, PICTURE).points as Float32Array;
  assert.deepEqual(point(points, NECK), [99.5, 59.5, 0.4]);
  assert.equal(point(points, LEFT_SHOULDER)[2], 0.4);
});

test("what lies outside the picture is not seen, nor is a neck without both shoulders", () => {
  const pose = landmarks(33, 0.9);
  (pose[12] as Landmark).y = 1.2;
  const points = poseFromLandmarks({ pose }, PICTURE).points as Float32Array;
  assert.deepEqual(point(points, RIGHT_SHOULDER), [0, 0, 0]);
  assert.deepEqual(point(points, NECK), [0, 0, 0]);
});

test("nothing found is nobody", () => {
  assert.deepEqual(poseFromLandmarks({}, PICTURE), { canvas: PICTURE, points: null });
});
