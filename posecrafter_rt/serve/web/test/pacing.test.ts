import assert from "node:assert/strict";
import { test } from "node:test";
import type { Pose } from "../src/layout.ts";
import { FrameGate, Pacer } from "../src/pacing.ts";

const STEPS = 4;

function pose(width: number): Pose {
  return { canvas: { height: 1, width }, points: null };
}

function pacer() {
  const clock = { ms: 0 };
  const sent: number[] = [];
  return { clock, sent, pacer: new Pacer(({ pose: { canvas } }) => sent.push(canvas.width), () => clock.ms) };
}

test("two poses are under way at most, and of those that wait the newest goes next", () => {
  const { sent, pacer: under } = pacer();
  for (const width of [1, 2, 3, 4, 5]) under.offer(pose(width));
  assert.deepEqual(sent, [1, 2]);
  assert.equal(under.acknowledge(1, 0, 0)?.pose.canvas.width, 1);
  assert.deepEqual(sent, [1, 2, 5]);
  assert.equal(under.overtaken, 2);
});

test("a pose that waits on, or goes out, is not overtaken by itself, but by any other", () => {
  const { clock, sent, pacer: under } = pacer();
  for (const width of [1, 2, 3]) under.offer(pose(width));
  clock.ms = 10;
  under.acknowledge(1, 0, 40);
  assert.deepEqual([sent, under.overtaken], [[1, 2], 0]);
  clock.ms = 50;
  under.offer(pose(4));
  assert.deepEqual([sent, under.overtaken], [[1, 2, 4], 1]);
});

/** Simulate a pipelined server and a fast camera. Returns how many new poses the server takes and gets sent. */
function runPipelined(numSteps: number, inFlight: number): { taken: number; sent: number } {
  const { clock, sent, pacer: under } = pacer();
  under.restart(inFlight);
  const [stepMs, cameraMs, wayMs] = [100, 16, 2];
  const pipeline: (number | null)[] = []; // null: there was nothing new
  let [taken, ready, landed]: [number, number, number | null] = [0, 0, null];
  for (clock.ms = 0; clock.ms < numSteps * stepMs; clock.ms += 2) {
    if (clock.ms % stepMs === 0) {
      landed = pipeline.length === STEPS ? (pipeline.shift() ?? null) : null;
      const isNew = sent.length > ready;
      ready = sent.length; // the newest of those that came meanwhile is taken
      pipeline.push(isNew ? ready : null);
      if (isNew) taken++;
    }
    if (clock.ms % stepMs === wayMs && landed !== null) under.acknowledge(landed, stepMs - wayMs, stepMs);
    if (clock.ms % cameraMs === 0) under.offer(pose(clock.ms + 1));
  }
  return { taken, sent: sent.length };
}

test("a pipelined server that tells how much it works at gets a new pose for every step", () => {
  const fed = runPipelined(60, STEPS);
  assert.ok(fed.taken > 50, `${fed.taken} new poses in 60 steps`);
  assert.ok(fed.sent < fed.taken + 2 * STEPS, `${fed.sent} sent, ${fed.taken} taken`);
  const starved = runPipelined(60, 1);
  assert.ok(starved.taken < 31, `${starved.taken} new poses in 60 steps`);
});

test("a frame answers every earlier pose too", () => {
  const { sent, pacer: under } = pacer();
  for (const width of [1, 2, 3]) under.offer(pose(width));
  under.acknowledge(2, 0, 0);
  under.offer(pose(4));
  assert.deepEqual(sent, [1, 2, 3, 4]);
});

test("an answer to nothing changes nothing", () => {
  const { sent, pacer: under } = pacer();
  under.offer(pose(1));
  assert.equal(under.acknowledge(0, 0, 0), null);
  assert.deepEqual(sent, [1]);
});

test("poses whose frame never comes do not stop the rest for ever", () => {
  const { clock, sent, pacer: under } = pacer();
  for (const width of [1, 2, 3]) under.offer(pose(width));
  clock.ms = 1499;
  under.offer(pose(4));
  assert.deepEqual(sent, [1, 2]);
  clock.ms = 1500;
  under.offer(pose(5));
  assert.deepEqual(sent, [1, 2, 5]);
});

test("a second pose sets out when the server should be about done with the first", () => {
  const { clock, sent, pacer: under } = pacer();
  under.offer(pose(1));
  clock.ms = 60;
  under.acknowledge(1, 20, 40);
  under.offer(pose(2));
  clock.ms = 109;
  under.offer(pose(3));
  assert.deepEqual(sent, [1, 2]);
  clock.ms = 110;
  under.offer(pose(4));
  assert.deepEqual(sent, [1, 2, 4]);
});

test("a new connection owes no answers, and sequences go on", () => {
  const sequences: number[] = [];
  const under = new Pacer(({ sequence }) => sequences.push(sequence), () => 0);
  for (const width of [1, 2, 3]) under.offer(pose(width));
  under.restart();
  under.offer(pose(4));
  assert.deepEqual(sequences, [1, 2, 3]);
  assert.equal(under.acknowledge(3, 0, 0)?.pose.canvas.width, 4);
});

test("of a source that was left no pose is sent or awaited any more, and the next one's go at once", () => {
  const { sent, pacer: under } = pacer();
  for (const width of [1, 2, 3]) under.offer(pose(width));
  under.forget();
  assert.equal(under.acknowledge(1, 0, 0), null);
  assert.deepEqual(sent, [1, 2]);
  under.offer(pose(4));
  assert.deepEqual(sent, [1, 2, 4]);
});

test("a pose whose frame was lost is sent again once nothing is under way", () => {
  const { clock, sent, pacer: under } = pacer();
  const last = pose(1);
  under.offer(last);
  under.offerAgain(last);
  assert.deepEqual(sent, [1]);
  clock.ms = 1500;
  under.offerAgain(last);
  under.offerAgain(last);
  assert.deepEqual(sent, [1, 1]);
  under.acknowledge(2, 0, 0);
  clock.ms = 1600;
  under.offerAgain(last); // its frame came, but too late to be shown
  assert.deepEqual(sent, [1, 1, 1]);
});

test("no frame older than the shown one passes, and a repeat of it does", () => {
  const gate = new FrameGate();
  assert.deepEqual([1, 3, 2, 3, 4].map((sequence) => gate.admit(sequence)), [true, true, false, true, true]);
  assert.equal(gate.late, 1);
  assert.equal(gate.admit(5, true), false);
  assert.equal(gate.admit(5), true);
  assert.equal(gate.late, 2);
});
