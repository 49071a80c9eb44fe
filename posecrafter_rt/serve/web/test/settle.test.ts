import assert from "node:assert/strict";
import { mock, test } from "node:test";
import { whenSettled } from "../src/settle.ts";

test("many changes are one call, once they have ended", () => {
  mock.timers.enable({ apis: ["setTimeout"] });
  let calls = 0;
  const change = whenSettled(() => calls++, 200);
  for (let count = 0; count < 50; count++) {
    change();
    mock.timers.tick(30);
  }
  assert.equal(calls, 0);
  mock.timers.tick(170);
  assert.equal(calls, 1);
  change();
  mock.timers.tick(1000);
  assert.equal(calls, 2);
  mock.timers.reset();
});
