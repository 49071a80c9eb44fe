import assert from "node:assert/strict";
import { test } from "node:test";
import { NUM_KEYPOINTS } from "../src/layout.ts";
import { decodeFrame, encodePose, parseServerMessage } from "../src/protocol.ts";

test("a pose's bytes are where the contract puts them", () => {
  const points = Float32Array.from({ length: NUM_KEYPOINTS * 3 }, (_, index) => index / 4);
  const view = new DataView(encodePose({ canvas: { height: 480, width: 640 }, points }, 4_000_000_000, 1234.5));
  assert.equal(view.byteLength, 24 + 12 * NUM_KEYPOINTS);
  assert.deepEqual([view.getUint8(0), view.getUint8(1), view.getUint16(2, true)], [1, 1, NUM_KEYPOINTS]);
  assert.equal(view.getUint32(4, true), 4_000_000_000);
  assert.equal(view.getFloat64(8, true), 1234.5);
  assert.deepEqual([view.getFloat32(16, true), view.getFloat32(20, true)], [480, 640]);
  assert.equal(view.getFloat32(24 + 4 * 401, true), 401 / 4);
});

test("nobody is a header alone", () => {
  const view = new DataView(encodePose({ canvas: { height: 2, width: 3 }, points: null }, 7, 0));
  assert.equal(view.byteLength, 24);
  assert.equal(view.getUint16(2, true), 0);
});

function frameBytes(picture: number[]): ArrayBuffer {
  const bytes = new ArrayBuffer(32 + picture.length);
  const view = new DataView(bytes);
  [2, 1, 1, 0b101].forEach((value, index) => view.setUint8(index, value));
  view.setUint32(4, 9, true);
  view.setFloat64(8, 77.25, true);
  view.setUint16(16, 128, true);
  view.setUint16(18, 160, true);
  view.setUint32(20, 3, true);
  view.setFloat32(24, 1.5, true);
  view.setFloat32(28, 20.5, true);
  new Uint8Array(bytes, 32).set(picture);
  return bytes;
}

test("a frame is read from its bytes", () => {
  const frame = decodeFrame(frameBytes([5, 6]));
  assert.deepEqual({ ...frame, picture: [...frame.picture] }, {
    format: 1, isHeld: true, sequence: 9, sentMs: 77.25,
    size: { height: 128, width: 160 }, dropped: 3, waitMs: 1.5, renderMs: 20.5, picture: [5, 6],
  });
});

test("other bytes are no frame", () => {
  assert.throws(() => decodeFrame(new ArrayBuffer(31)), /31 bytes/);
  const pose = encodePose({ canvas: { height: 2, width: 3 }, points: new Float32Array(NUM_KEYPOINTS * 3) }, 1, 0);
  assert.throws(() => decodeFrame(pose), /type 1/);
});

test("messages of a kind that is not known are left alone", () => {
  assert.deepEqual(parseServerMessage('{"type":"recording","on":true,"url":null}'), { type: "recording", on: true, url: null });
  assert.equal(parseServerMessage('{"type":"weather"}'), null);
  assert.equal(parseServerMessage("3"), null);
});
