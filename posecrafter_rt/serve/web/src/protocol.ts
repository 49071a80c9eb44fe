// The wire messages: poses up, frames down, and JSON both ways (docs/serve.md). Bytes to values and back, no state.
import { NUM_KEYPOINTS, type Pose, type Size } from "./layout.ts";

const VERSION = 1;
const POSE = 1;
const FRAME = 2;
const POSE_HEADER_BYTES = 24;
const FRAME_HEADER_BYTES = 32;
/** The format of a frame whose picture comes over the video track. */
export const NO_PICTURE = 0;
const HELD = 1;

/** A frame, or the notice that it comes over the video track. `sequence` and `sentMs` are those of its pose. */
export interface Frame {
  format: number;
  isHeld: boolean;
  sequence: number;
  sentMs: number;
  size: Size;
  dropped: number;
  waitMs: number;
  renderMs: number;
  picture: Uint8Array<ArrayBuffer>;
}

export interface Ready {
  type: "ready";
  backend: string;
  precision: string;
  /** How many poses the server works on at once; more than one if it is pipelined. */
  in_flight: number;
  sessions: number;
  max_sessions: number;
}
/** Comes each second, and so shows that the connection lives. */
export interface ServerStats {
  type: "stats";
}
export interface RecordingState {
  type: "recording";
  on: boolean;
  url: string | null;
  /** Why a recording has ended by itself, else null or missing. */
  reason?: string | null;
}
export interface ServerError {
  type: "error";
  message: string;
  hint: string | null;
}
export type ServerMessage = Ready | ServerStats | RecordingState | ServerError;

export type Command =
  | { type: "configure"; format?: "jpeg" | "rgb"; quality?: number; fit?: "person" | "canvas" }
  | { type: "reset" }
  | { type: "record"; on: boolean };

/** Encode a pose, little-endian: a header of 24 bytes, then 12 bytes per keypoint. */
export function encodePose(pose: Pose, sequence: number, sentMs: number): ArrayBuffer {
  const count = pose.points === null ? 0 : NUM_KEYPOINTS;
  const bytes = new ArrayBuffer(POSE_HEADER_BYTES + 12 * count);
  const view = new DataView(bytes);
  view.setUint8(0, POSE);
  view.setUint8(1, VERSION);
  view.setUint16(2, count, true);
  view.setUint32(4, sequence, true);
  view.setFloat64(8, sentMs, true);
  view.setFloat32(16, pose.canvas.height, true);
  view.setFloat32(20, pose.canvas.width, true);
  pose.points?.forEach((value, index) => view.setFloat32(POSE_HEADER_BYTES + 4 * index, value, true));
  return bytes;
}

/** Decode a frame. Throws an Error for any other message. */
export function decodeFrame(bytes: ArrayBuffer): Frame {
  if (bytes.byteLength < FRAME_HEADER_BYTES) throw new Error(`a frame message of ${bytes.byteLength} bytes`);
  const view = new DataView(bytes);
  const [type, version, flags] = [view.getUint8(0), view.getUint8(1), view.getUint8(3)];
  if (type !== FRAME || version !== VERSION) throw new Error(`a message of type ${type}, version ${version}`);
  return {
    format: view.getUint8(2),
    isHeld: (flags & HELD) !== 0,
    sequence: view.getUint32(4, true),
    sentMs: view.getFloat64(8, true),
    size: { height: view.getUint16(16, true), width: view.getUint16(18, true) },
    dropped: view.getUint32(20, true),
    waitMs: view.getFloat32(24, true),
    renderMs: view.getFloat32(28, true),
    picture: new Uint8Array(bytes, FRAME_HEADER_BYTES),
  };
}

/** Parse a JSON message of the server. Returns null for an unknown type, such as that of a later version. */
export function parseServerMessage(text: string): ServerMessage | null {
  const value: unknown = JSON.parse(text);
  if (typeof value !== "object" || value === null || !("type" in value)) return null;
  const known = ["ready", "stats", "recording", "error"];
  return known.includes(value.type as string) ? (value as ServerMessage) : null;
}
