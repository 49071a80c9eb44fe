// The server's HTTP side: every request, and what its answers mean.
import { decodeTrack, type Track } from "./track.ts";

/** A server that was told to leave off a file needs a moment for that. */
const BUSY_MS = 1000;
/** Shorter than the time between two of the page's looks at the server, so that no two of them are under way. */
const INFO_TIMEOUT_MS = 4000;

export interface Info {
  name: string;
  size: [number, number];
  backend: string;
  precision: string;
  device: string;
  steps: number;
  window: number;
  sessions: number;
  max_sessions: number;
  has_pose_extraction: boolean;
}

/** What the server did not want to do, in its words. */
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

/** The server's address for a path such as "api/info"; the page may lie under any folder of a host. */
export function address(path: string): URL {
  const url = new URL(path.replace(/^\//, ""), document.baseURI);
  const token = new URLSearchParams(location.search).get("token");
  if (token !== null) url.searchParams.set("token", token);
  return url;
}

/** What is served. A server that stands still counts as one that is not there. */
export async function fetchInfo(): Promise<Info> {
  return (await (await request("api/info", { signal: AbortSignal.timeout(INFO_TIMEOUT_MS) })).json()) as Info;
}

/** The poses that the avatar was tuned on. */
export async function fetchPoses(): Promise<Track> {
  return decodeTrack(await (await request("api/poses")).json());
}

/** What the avatar looks like before the first pose. */
export async function fetchReference(): Promise<ImageBitmap> {
  return createImageBitmap(await (await request("api/reference.jpg")).blob());
}

/** The poses in a pose file or a video; finding them in a video, of whatever kind, takes the server a while. */
export async function readPoses(
  file: File, type: "application/json" | "video/mp4", signal: AbortSignal,
): Promise<Track> {
  const send = () => request("api/poses", { body: file, type, signal });
  const response = await send().catch(async (error: unknown) => {
    if (!(error instanceof Refusal && error.status === 429)) throw error;
    await new Promise((resolve) => setTimeout(resolve, BUSY_MS));
    return send();
  });
  return decodeTrack(await response.json());
}

/** Hand over an offer of a WebRTC connection; returns the answer. */
export async function exchangeOffer(offer: RTCSessionDescriptionInit): Promise<RTCSessionDescriptionInit> {
  return (await request("api/offer", { body: JSON.stringify(offer), type: "application/json" })).json();
}

async function request(
  path: string, { body, type, signal }: { body?: BodyInit; type?: string; signal?: AbortSignal } = {},
): Promise<Response> {
  const post = body === undefined ? {} : { method: "POST", body, headers: { "Content-Type": type ?? "" } };
  const response = await fetch(address(path), { ...post, signal: signal ?? null }).catch((error: unknown) => {
    // Browsers say it each in its own way, and none says what to do.
    throw error instanceof TypeError ? new Error("The server did not answer. Try again when it is back") : error;
  });
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response: Response): Promise<Refusal> {
  const said: { message?: string; hint?: string | null } = await response.json().catch(() => ({}));
  return new Refusal(said.message ?? `the server answered ${response.status}`, said.hint ?? null, response.status);
}
