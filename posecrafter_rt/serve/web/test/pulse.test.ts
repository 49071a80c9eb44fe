import assert from "node:assert/strict";
import { test } from "node:test";
import { Pulse } from "../src/pulse.ts";

test("a server is lost after two misses in a row, each time anew", () => {
  let lost = 0;
  const pulse = new Pulse(() => lost++);
  const after = (...signs: ("beat" | "miss")[]) => {
    for (const sign of signs) pulse[sign]();
    return lost;
  };
  assert.equal(after("miss", "beat", "miss"), 0);
  assert.equal(after("miss"), 1);
  assert.equal(after("miss"), 1);
  assert.equal(after("miss"), 2);
});
