import assert from "node:assert/strict";
import { test } from "node:test";
import { readPoses } from "../src/api.ts";

test("a file that the server would refuse for its size is not sent", async () => {
  const { signal } = new AbortController();
  const bytes = (size: number) => ({ name: "long", size: size + 1 }) as File;
  await assert.rejects(readPoses(bytes(2 ** 28), "video/mp4", signal), /^Error: long has more than 256 MiB/);
  await assert.rejects(readPoses(bytes(2 ** 25), "application/json", signal), /^Error: long has more than 32 MiB/);
});
