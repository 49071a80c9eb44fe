// Two ways to the server with one interface: a WebSocket, or WebRTC with a data channel and a video track.
import { address, exchangeOffer, Refusal } from "./api.ts";

export type Way = "websocket" | "webrtc";

/** The codes of the server's closes that are told apart here; docs/serve.md has them all. */
export const BAD_REQUEST = 1008;
export const FULL = 1013;
export const BROKEN = 1011;
const ABNORMAL = 1006;
/** Ours: a WebSocket that the other side did not open. It says nothing of why: nobody was there, or a proxy refused or kept silent. */
export const UNOPENED = 0;

export interface TransportEvents {
  onBytes(bytes: ArrayBuffer): void;
  onText(text: string): void;
  onVideo(stream: MediaStream): void;
  /** Called once, and never after `close`. */
  onClose(code: number, reason: string): void;
}

export interface Transport {
  send(data: ArrayBuffer | string): void;
  close(): void;
}

/** If gathering addresses works at all, or opening a connection once an offer is answered, it takes no longer than this. */
const GATHERING_MS = 1500;
const OPENING_MS = 6000;
/** How much may still wait to be sent when a pose comes: commands, but no other pose. */
const MOST_WAITING_BYTES = 1024;

export function openTransport(way: Way, events: TransportEvents): Transport {
  if (way === "websocket") return openWebSocket(events);
  try {
    return openWebRtc(events);
  } catch (error) {
    console.info("no WebRTC:", error);
    queueMicrotask(() => events.onClose(ABNORMAL, "this browser has none, or does not allow it"));
    return { send: () => {}, close: () => {} };
  }
}

function openWebSocket(events: TransportEvents): Transport {
  const url = address("ws");
  url.protocol = url.protocol.replace("http", "ws");
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => (typeof data === "string" ? events.onText(data) : events.onBytes(data));
  let hasOpened = false;
  socket.onclose = ({ code, reason }) => {
    clearTimeout(timer);
    events.onClose(code === ABNORMAL && !hasOpened ? UNOPENED : code, reason);
  };
  const close = () => {
    clearTimeout(timer);
    socket.onmessage = socket.onclose = null;
    socket.close();
  };
  // A server that hangs, or a proxy, accepts a connection but never answers; browsers wait for minutes.
  const timer = setTimeout(() => {
    close();
    events.onClose(UNOPENED, "");
  }, OPENING_MS);
  socket.onopen = () => {
    hasOpened = true;
    clearTimeout(timer);
  };
  return {
    send: (data) => {
      if (socket.readyState === WebSocket.OPEN) socket.send(data);
    },
    close,
  };
}

function openWebRtc(events: TransportEvents): Transport {
  const peer = new RTCPeerConnection();
  const channel = peer.createDataChannel("poses"); // reliable, because it carries commands too
  channel.binaryType = "arraybuffer";
  let isOver = false;
  const end = () => {
    isOver = true;
    clearTimeout(timer);
    peer.close();
  };
  const fail = (code: number, reason: string) => {
    if (isOver) return;
    end();
    events.onClose(code, reason);
  };
  let timer: ReturnType<typeof setTimeout> | undefined;
  const limit = () => {
    clearTimeout(timer);
    if (!isOver) timer = setTimeout(() => fail(ABNORMAL, "the server was not reached that way"), OPENING_MS);
  };
  limit();
  channel.onopen = () => clearTimeout(timer);
  channel.onclose = () => fail(ABNORMAL, "the data channel closed");
  channel.onmessage = ({ data }) => (typeof data === "string" ? events.onText(data) : events.onBytes(data));
  peer.ontrack = ({ track, streams }) => events.onVideo(streams[0] ?? new MediaStream([track]));
  peer.onconnectionstatechange = () => {
    if (peer.connectionState === "failed") fail(ABNORMAL, "the WebRTC connection was lost");
  };
  // The server keeps the client's place for some seconds from its answer. Only then may the page want another place.
  negotiate(peer, limit).catch((error: unknown) => fail(closeCode(error), error instanceof Error ? error.message : ""));
  return {
    send: (data) => {
      // Poses that the network cannot take yet would only be late.
      if (channel.readyState !== "open" || (typeof data !== "string" && channel.bufferedAmount > MOST_WAITING_BYTES)) return;
      channel.send(data as string); // both types work; the declarations have no union
    },
    close: end,
  };
}

async function negotiate(peer: RTCPeerConnection, onAnswer: () => void): Promise<void> {
  peer.addTransceiver("video", { direction: "recvonly" });
  await peer.setLocalDescription(await peer.createOffer());
  await gathered(peer);
  const offer = peer.localDescription as RTCSessionDescription;
  const answer = await exchangeOffer({ type: offer.type, sdp: offer.sdp });
  onAnswer();
  await peer.setRemoteDescription(answer);
}

/** Wait until the peer knows its own addresses, which the offer carries, but at most GATHERING_MS. */
function gathered(peer: RTCPeerConnection): Promise<void> {
  return new Promise((resolve) => {
    if (peer.iceGatheringState === "complete") return resolve();
    setTimeout(resolve, GATHERING_MS);
    peer.addEventListener("icegatheringstatechange", () => {
      if (peer.iceGatheringState === "complete") resolve();
    });
  });
}

/** Return the code with which a WebSocket would have closed for this refusal of an offer. */
function closeCode(error: unknown): number {
  if (!(error instanceof Refusal)) return ABNORMAL;
  if (error.status === 503) return FULL;
  return error.isAboutToken ? BAD_REQUEST : ABNORMAL;
}
