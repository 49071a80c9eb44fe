// The page of posecrafter-rt serve: wires the sources of poses to the connection, and the frames to the screen.
import "./style.css";
import { fetchInfo, fetchPoses, fetchReference, Refusal, type Info } from "./api.ts";
import { Connection, type LinkState } from "./connection.ts";
import { byId } from "./dom.ts";
import type { ServerMessage } from "./protocol.ts";
import { Pulse } from "./pulse.ts";
import { Recorder } from "./recorder.ts";
import { Screen } from "./screen.ts";
import { whenSettled } from "./settle.ts";
import { Sources } from "./sources.ts";
import { AvatarView, PoseView } from "./stage.ts";
import { Status } from "./status.ts";
import { setUpTheme } from "./theme.ts";
import type { Way } from "./transport.ts";

const INFO_EVERY_MS = 5000;
/** Longer than the repeat interval of a held key: a change sends two commands, and ten per second are allowed. */
const SETTLING_MS = 200;
const LATENCY = "From a pose's sending to its frame on this page, the median of two seconds";
/** A video track does not say which pose a picture shows. */
const LATENCY_OF_VIDEO =
  "Approximate: from a pose's sending to the video's next picture once the server has sent its frame, the median of two seconds";
const WHY_NO_OVERLAY = "Not while the person is fitted: only the server knows where the fitted pose lies";

const poseView = new PoseView(byId("pose", HTMLCanvasElement));
const overlayView = new PoseView(byId("avatar-pose", HTMLCanvasElement));
const avatarView = new AvatarView(byId("avatar", HTMLCanvasElement), overlayView);
const overlayBox = byId("overlay", HTMLInputElement);
const wayChoice = byId("way", HTMLSelectElement);
const connection = new Connection({
  onState: showState,
  onFrame: (frame) => {
    pulse.beat();
    status.setHeld(frame.isHeld);
    void screen.onFrame(frame);
  },
  onMessage: takeMessage,
  onVideo: (stream) => screen.onVideo(stream),
  onFallback: (reason) => {
    wayChoice.value = "websocket";
    status.note(`WebRTC did not connect, so the page uses the WebSocket${reason && `: ${reason}`}`);
  },
});
const screen = new Screen(avatarView, (bytes) => connection.sendBytes(bytes), () => {
  status.note("Frames come more than a second late, and are not shown: this machine or the line to the server is too slow");
});
const status = new Status(() => connection.open());
const pulse = new Pulse(() => connection.giveUp());
const recorder = new Recorder((on) => connection.command({ type: "record", on }));
const tellOfChange = whenSettled(() => {
  connection.command({ type: "configure", fit: sources.fit });
  connection.command({ type: "reset" }); // the next pose is of another person, or in another place
  screen.release();
}, SETTLING_MS);
const sources = new Sources(
  poseView,
  (pose) => {
    poseView.show(pose);
    screen.drive(pose);
  },
  () => {
    screen.hold();
    tellOfChange();
    avatarView.forgetPose();
    showOverlay();
  },
);
let isLive = false;
let avatar: string | null = null;

function showState(state: LinkState): void {
  status.show(state);
  pulse.beat(); // a silence before is not held against a new connection
  isLive = state.kind === "live";
  recorder.setLive(isLive);
  if (state.kind === "live") {
    showInfo(state.ready);
    byId("latency-figure", HTMLDivElement).title = state.way === "webrtc" ? LATENCY_OF_VIDEO : LATENCY;
    connection.command({ type: "configure", format: "jpeg", fit: sources.fit });
  }
  screen.setLive(state.kind === "live" ? state.ready.in_flight : null);
  if (isLive) void loadAvatar();
}

function takeMessage(message: ServerMessage): void {
  pulse.beat();
  if (message.type === "recording") recorder.onState(message);
  // An error before a connection is refused is shown on the card about the refusal.
  if (message.type === "error" && isLive) status.note(message.message);
}

/** Load the avatar's name, picture and poses, and begin the demo. If the server has another avatar now, reload. */
async function loadAvatar(): Promise<void> {
  try {
    const info = await fetchInfo();
    const known = `${info.name} ${info.size}`;
    if (avatar === known) return;
    if (avatar !== null) return location.reload();
    const [reference, poses] = await Promise.all([fetchReference(), fetchPoses()]);
    if (avatar !== null) return;
    avatar = known;
    showAvatar(info, reference);
    sources.setDemo(poses);
  } catch (error) {
    // The connection reports what is wrong with the server, and calls this again when the server is back.
    console.info("the avatar is not there yet:", error);
  }
}

function showAvatar(info: Info, reference: ImageBitmap): void {
  const [height, width] = info.size;
  const name = info.name.replace(/\.engine$/, "");
  document.documentElement.style.setProperty("--aspect", `${width} / ${height}`);
  document.title = `${name} · posecrafter`;
  byId("name", HTMLSpanElement).textContent = name;
  sources.setServerReadsVideos(info.has_pose_extraction);
  avatarView.show(reference, { height, width }, null);
}

function showInfo(info: Pick<Info, "backend" | "precision" | "sessions" | "max_sessions">): void {
  byId("backend", HTMLElement).textContent = `${info.backend} ${info.precision}`;
  byId("sessions", HTMLElement).textContent = `${info.sessions} of ${info.max_sessions}`;
}

async function lookAtServer(): Promise<void> {
  pulse.look();
  try {
    showInfo(await fetchInfo());
    onAnswer();
    if (avatar === null) void loadAvatar();
  } catch (error) {
    if (error instanceof Refusal) onAnswer(); // a refusal is an answer too
  }
}

/** Note an answer over HTTP. It says nothing of a live connection, over which the server sends a message each second. */
function onAnswer(): void {
  if (!isLive) pulse.beat();
}

/** Draw the pose over the avatar if people want it and the page knows where it lies. */
function showOverlay(): void {
  const isFitted = sources.fit === "person";
  overlayBox.disabled = isFitted;
  byId("overlay-switch", HTMLLabelElement).title = isFitted ? WHY_NO_OVERLAY : "";
  avatarView.setOverlay(overlayBox.checked && !isFitted);
}

setUpTheme();
overlayBox.onchange = showOverlay;
wayChoice.onchange = () => {
  status.note("");
  connection.open(wayChoice.value as Way);
};
setInterval(() => {
  if (connection.isUnderWay && !document.hidden) void lookAtServer();
}, INFO_EVERY_MS);
document.addEventListener("visibilitychange", () => pulse.beat()); // what was missed while hidden says little
void loadAvatar();
connection.open();
