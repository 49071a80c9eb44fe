import assert from "node:assert/strict";
import { test } from "node:test";
import { Pulse } from "../src/pulse.ts";

test("a connection is lost after two silences between looks in a row, each time anew", () => {
  let lost = 0;
  const pulse = new Pulse(() => lost++);
  const after = (...signs: ("beat" | "look")[]) => {
    for (const sign of signs) pulse[sign]();
    return lost;
  };
  assert.equal(after("look", "beat", "look", "beat", "look"), 0);
  assert.equal(after("look", "beat", "look", "look"), 0);
  assert.equal(after("look"), 1);
  assert.equal(after("look", "look"), 1);
  assert.equal(after("look"), 2);
});
