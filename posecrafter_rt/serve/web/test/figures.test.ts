import assert from "node:assert/strict";
import { test } from "node:test";
import { retryDelayMs } from "../src/backoff.ts";
import { contain, cover, toPicture } from "../src/geometry.ts";
import { Meter } from "../src/meter.ts";

test("waiting grows, is capped and spread", () => {
  const delays = Array.from({ length: 12 }, (_, attempt) => retryDelayMs(attempt, () => 0.5));
  assert.deepEqual([...delays].sort((a, b) => a - b), delays);
  assert.equal(delays[0], 400);
  assert.equal(delays[11], 5000);
  assert.ok(retryDelayMs(3, () => 0) < retryDelayMs(3, () => 1));
});

test("a picture is centred in its box, and points find their way back", () => {
  const placement = contain({ height: 100, width: 200 }, { height: 400, width: 400 });
  assert.deepEqual(placement, { scale: 2, left: 0, top: 100 });
  assert.deepEqual(toPicture(placement, 1, 101), { x: 0, y: 0 });
  assert.deepEqual(toPicture(placement, 399, 299), { x: 199, y: 99 });
});

test("a picture covers a frame: its centre stays, what is too much of it is cut off", () => {
  const frame = { height: 64, width: 48 };
  const placement = contain(frame, { height: 128, width: 200 });
  assert.deepEqual(placement, { scale: 2, left: 52, top: 0 });
  assert.deepEqual(cover({ height: 96, width: 48 }, frame, placement), { scale: 2, left: 52, top: -32 });
  assert.deepEqual(cover({ height: 32, width: 48 }, frame, placement), { scale: 4, left: 4, top: 0 });
});

test("the meter counts the frames of the last two seconds", () => {
  const meter = new Meter();
  assert.equal(meter.read(0), null);
  meter.add(0, 900);
  for (let frame = 0; frame < 40; frame++) meter.add(3000 + frame * 50, 20 + (frame % 5));
  const read = meter.read(4950);
  assert.ok(read !== null && Math.abs(read.fps - 20) < 0.01, `${read?.fps}`);
  assert.equal(read.latencyMs, 22);
  meter.clear();
  assert.equal(meter.read(4950), null);
});
