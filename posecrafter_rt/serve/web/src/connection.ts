// One lasting connection to the server, over either transport. It reconnects by itself and reports its state.
import { fetchInfo, Refusal } from "./api.ts";
import { retryDelayMs } from "./backoff.ts";
import { decodeFrame, parseServerMessage, type Command, type Frame, type Ready, type ServerMessage } from "./protocol.ts";
import { BAD_REQUEST, BROKEN, FULL, openTransport, UNOPENED, type Transport, type Way } from "./transport.ts";

/** The wait when the server is full: long enough for someone to leave, short enough to wait for. */
const FULL_RETRY_MS = 8000;
const NO_WEBSOCKET = {
  message: "it answers, but its WebSocket cannot be reached",
  hint: "a proxy in between must pass on Upgrade and Connection",
};

export type LinkState =
  | { kind: "connecting" }
  | { kind: "live"; ready: Ready; way: Way }
  | { kind: "gone"; retryInMs: number }
  | { kind: "broken"; message: string; hint: string | null; retryInMs: number }
  | { kind: "full"; message: string; retryInMs: number }
  | { kind: "refused"; message: string; hint: string | null; wantsToken: boolean };

export interface ConnectionEvents {
  onState(state: LinkState): void;
  onFrame(frame: Frame): void;
  onMessage(message: ServerMessage): void;
  onVideo(stream: MediaStream | null): void;
  /** WebRTC did not connect, so the WebSocket takes over. The reason may be empty. */
  onFallback(reason: string): void;
}

export class Connection {
  private transport: Transport | null = null;
  private timer: ReturnType<typeof setTimeout> | undefined;
  private attempt = 0;
  private isLive = false;
  /** An opened transport has not ended, whether the server has said `ready` or not. */
  isUnderWay = false;
  private lastError: { message: string; hint: string | null } | null = null;

  constructor(
    private readonly events: ConnectionEvents,
    private way: Way = "websocket",
  ) {}

  /** Close any earlier connection and connect now, over `way` if it is given. */
  open(way: Way = this.way): void {
    clearTimeout(this.timer);
    this.transport?.close();
    this.events.onVideo(null);
    this.way = way;
    this.isLive = false;
    this.isUnderWay = true;
    this.lastError = null;
    this.events.onState({ kind: "connecting" });
    // askServer may still be checking the end of an earlier transport; the result is not about this one.
    const isCurrent = () => this.transport === transport;
    const transport = openTransport(way, {
      onBytes: (bytes) => {
        this.attempt = 0; // not on `ready`: a stream may close itself at its first pose, each time
        this.events.onFrame(decodeFrame(bytes));
      },
      onText: (text) => this.onText(text),
      onVideo: (stream) => this.events.onVideo(stream),
      onClose: (code, reason) => void this.onClose(code, reason, isCurrent),
    });
    this.transport = transport;
  }

  /** Drop a connection that has not ended although the server no longer answers, and reconnect. */
  giveUp(): void {
    if (!this.isUnderWay) return;
    this.isLive = this.isUnderWay = false;
    this.transport?.close();
    this.events.onVideo(null);
    this.retry({ kind: "gone", retryInMs: retryDelayMs(this.attempt++) });
  }

  sendBytes(bytes: ArrayBuffer): void {
    if (this.isLive) this.transport?.send(bytes);
  }

  command(command: Command): void {
    if (this.isLive) this.transport?.send(JSON.stringify(command));
  }

  private onText(text: string): void {
    const message = parseServerMessage(text);
    if (message === null) return;
    if (message.type === "ready") {
      this.isLive = true;
      this.events.onState({ kind: "live", ready: message, way: this.way });
    } else if (message.type === "error") {
      this.lastError = { message: message.message, hint: message.hint };
    }
    this.events.onMessage(message);
  }

  private async onClose(code: number, reason: string, isCurrent: () => boolean): Promise<void> {
    const wasLive = this.isLive;
    this.isLive = this.isUnderWay = false;
    const message = this.lastError?.message ?? reason;
    if (code === FULL) return this.retry({ kind: "full", message, retryInMs: FULL_RETRY_MS });
    // The server has told what is broken; else it gives this code to a page that does not answer its pings.
    if (code === BROKEN && reason !== "" && this.lastError?.message.startsWith(reason)) {
      const { hint } = this.lastError;
      return this.retry({ kind: "broken", message, hint, retryInMs: retryDelayMs(this.attempt++) });
    }
    // To a page, a refused handshake looks like a server that is not there. A request over HTTP gets an answer.
    const answer = wasLive && code !== BAD_REQUEST ? "gone" : await askServer();
    if (!isCurrent()) return;
    if (this.way === "webrtc" && !wasLive && answer === "here" && code !== BAD_REQUEST) {
      this.events.onFallback(message);
      return this.open("websocket");
    }
    if (code === UNOPENED && answer === "here") {
      return this.retry({ kind: "broken", ...NO_WEBSOCKET, retryInMs: retryDelayMs(this.attempt++) });
    }
    if (code !== BAD_REQUEST && !(answer instanceof Refusal)) {
      return this.retry({ kind: "gone", retryInMs: retryDelayMs(this.attempt++) });
    }
    const refusal = answer instanceof Refusal ? answer : null;
    this.events.onState({
      kind: "refused",
      message: message || refusal?.message || "the server refused the connection",
      hint: this.lastError?.hint ?? refusal?.hint ?? null,
      wantsToken: refusal !== null,
    });
  }

  private retry(state: Extract<LinkState, { retryInMs: number }>): void {
    this.events.onState(state);
    this.timer = setTimeout(() => this.open(), state.retryInMs);
  }
}

/** Ask whether the server is there. Returns its refusal if it demands a token that the page does not have. */
async function askServer(): Promise<"here" | "gone" | Refusal> {
  try {
    await fetchInfo();
    return "here";
  } catch (error) {
    if (!(error instanceof Refusal) || error.status >= 500) return "gone"; // a proxy answers so for a server that is gone
    return error.isAboutToken ? error : "here";
  }
}
