// All HTTP requests to the server, and how the page reads the answers.
import { decodeTrack, type Track } from "./track.ts";

/** A server that was told to stop reading a file needs a moment to stop. */
const BUSY_MS = 1000;
/** Shorter than the interval between two checks of the server (INFO_EVERY_MS), so that checks never overlap. */
const INFO_TIMEOUT_MS = 4000;
/** The most MiB that the server takes (options.py). It refuses more, but a browser may see that only after the upload. */
const MAX_POSE_FILE_MIB = 32;
const MAX_VIDEO_MIB = 256;

export interface Info {
  name: string;
  size: [number, number];
  backend: string;
  precision: string;
  sessions: number;
  max_sessions: number;
  has_pose_extraction: boolean;
}

/** A request that the server refused, with the server's message and hint. */
export class Refusal extends Error {
  constructor(
    message: string,
    readonly hint: string | null,
    readonly status: number,
  ) {
    super(message);
  }

  get isAboutToken(): boolean {
    return this.status === 401;
  }
}

/** Return the URL for a path such as "api/info", with the page's token. The page may lie in any folder of a host. */
export function address(path: string): URL {
  const url = new URL(path.replace(/^\//, ""), document.baseURI);
  const token = new URLSearchParams(location.search).get("token");
  if (token !== null) url.searchParams.set("token", token);
  return url;
}

/** Return what is served. A server that hangs counts as one that is not there. */
export async function fetchInfo(): Promise<Info> {
  return (await (await request("api/info", { signal: AbortSignal.timeout(INFO_TIMEOUT_MS) })).json()) as Info;
}

/** The poses that the avatar was tuned on. */
export async function fetchPoses(): Promise<Track> {
  return decodeTrack(await (await request("api/poses")).json());
}

/** The picture of the avatar before the first pose. */
export async function fetchReference(): Promise<ImageBitmap> {
  return createImageBitmap(await (await request("api/reference.jpg")).blob());
}

/** Return the poses in a pose file or in a video of any kind. The server takes a while to find them in a video. */
export async function readPoses(
  file: File, type: "application/json" | "video/mp4", signal: AbortSignal,
): Promise<Track> {
  const limit = type === "video/mp4" ? MAX_VIDEO_MIB : MAX_POSE_FILE_MIB;
  if (file.size > limit * 2 ** 20) {
    throw new Error(`${file.name} has more than ${limit} MiB, the most that can be sent. Choose a shorter one`);
  }
  const send = () => request("api/poses", { body: file, type, signal });
  const response = await send().catch(async (error: unknown) => {
    if (!(error instanceof Refusal && error.status === 429)) throw error;
    await new Promise((resolve) => setTimeout(resolve, BUSY_MS));
    return send();
  });
  return decodeTrack(await response.json());
}

/** Return whether the server has a finished recording. Where it cannot be asked, it may have. */
export async function hasRecording(path: string): Promise<boolean> {
  try {
    await (await request(path)).body?.cancel();
    return true;
  } catch (error) {
    return !(error instanceof Refusal && error.status === 404);
  }
}

/** Send the offer of a WebRTC connection and return the answer. */
export async function exchangeOffer(offer: RTCSessionDescriptionInit): Promise<RTCSessionDescriptionInit> {
  return (await request("api/offer", { body: JSON.stringify(offer), type: "application/json" })).json();
}

async function request(
  path: string, { body, type, signal }: { body?: BodyInit; type?: string; signal?: AbortSignal } = {},
): Promise<Response> {
  const post = body === undefined ? {} : { method: "POST", body, headers: { "Content-Type": type ?? "" } };
  const response = await fetch(address(path), { ...post, signal: signal ?? null }).catch((error: unknown) => {
    // Each browser words this error differently, and none says what to do.
    throw error instanceof TypeError ? new Error("The server cannot be reached, or the connection broke off. Try again") : error;
  });
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response: Response): Promise<Refusal> {
  const said: { message?: string; hint?: string | null } = await response.json().catch(() => ({}));
  return new Refusal(said.message ?? `the server answered ${response.status}`, said.hint ?? null, response.status);
}
