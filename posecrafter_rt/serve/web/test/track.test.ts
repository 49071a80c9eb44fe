import assert from "node:assert/strict";
import { test } from "node:test";
import { NUM_KEYPOINTS } from "../src/layout.ts";
import type { Repeat } from "../src/clip.ts";
import { decodeTrack, Playback, trackPose } from "../src/track.ts";

function json(points: Float32Array, numFrames: number) {
  const keypoints = Buffer.from(points.buffer).toString("base64");
  return { fps: 25, canvas: [48, 64] as [number, number], num_frames: numFrames, keypoints };
}

test("a track is read, and an empty frame shows nobody", () => {
  const points = new Float32Array(2 * NUM_KEYPOINTS * 3);
  points.set([1.5, 2.5, 0.9], (NUM_KEYPOINTS + 1) * 3);
  const track = decodeTrack(json(points, 2));
  assert.deepEqual(trackPose(track, 0), { canvas: { height: 48, width: 64 }, points: null });
  assert.deepEqual([...(trackPose(track, 1).points as Float32Array).slice(3, 6)], [1.5, 2.5, Math.fround(0.9)]);
});

test("a track of the wrong length is refused", () => {
  assert.throws(() => decodeTrack(json(new Float32Array(NUM_KEYPOINTS * 3), 2)), /2 frames/);
  assert.throws(() => decodeTrack(json(new Float32Array(0), 0)), /0 frames/);
});

function played(repeat: Repeat, numFrames: number, frames: number): number[] {
  const playback = new Playback(numFrames, 10);
  playback.isPlaying = true;
  playback.repeat = repeat;
  return Array.from({ length: frames }, () => {
    const { index } = playback;
    playback.advance(100);
    return index;
  });
}

test("a track loops, swings, or ends", () => {
  assert.deepEqual(played("loop", 3, 7), [0, 1, 2, 0, 1, 2, 0]);
  assert.deepEqual(played("swing", 4, 9), [0, 1, 2, 3, 2, 1, 0, 1, 2]);
  assert.deepEqual(played("once", 3, 5), [0, 1, 2, 2, 2]);
});

test("a single pose stays, however it repeats", () => {
  for (const repeat of ["loop", "swing", "once"] as const) assert.deepEqual(played(repeat, 1, 3), [0, 0, 0]);
});

test("speed, pause and searching", () => {
  const playback = new Playback(20, 10);
  playback.advance(500);
  assert.equal(playback.index, 0);
  playback.toggle();
  playback.speed = 0.5;
  playback.advance(1000);
  assert.equal(playback.index, 5);
  playback.seek(99);
  assert.equal(playback.index, 19);
  playback.seek(7);
  playback.setRepeat("swing");
  assert.equal(playback.index, 7);
});

test("a track that has ended starts again from the beginning", () => {
  const playback = new Playback(3, 10);
  playback.repeat = "once";
  playback.toggle();
  playback.advance(1000);
  assert.deepEqual([playback.isPlaying, playback.index], [false, 2]);
  playback.toggle();
  assert.deepEqual([playback.isPlaying, playback.index], [true, 0]);
});
