import assert from "node:assert/strict";
import { test } from "node:test";
import { Tracker } from "../src/tracker.ts";

test("a tracker that fails is loaded anew for the next picture, and told again whether it is mirrored", async () => {
  const made: { settings: object[] }[] = [];
  class Failing {
    readonly settings: object[] = [];
    constructor() {
      made.push(this);
    }
    setOptions(options: object): void {
      this.settings.push(options);
    }
    onResults(): void {}
    async initialize(): Promise<void> {}
    async send(): Promise<void> {
      if (made.length === 1) throw new Error("the context was lost");
    }
  }
  Object.assign(globalThis, { window: { Holistic: Failing } });
  const tracker = new Tracker();
  const video = { videoHeight: 48, videoWidth: 64 } as HTMLVideoElement;
  await tracker.load();
  await assert.rejects(tracker.find(video, true), /the context was lost/);
  await new Promise((resolve) => setTimeout(resolve)); // until it is no longer busy
  assert.equal(await tracker.find(video, true), null); // nobody is found
  assert.equal(made.length, 2);
  assert.deepEqual(made[1]?.settings.at(-1), { selfieMode: true });
});
