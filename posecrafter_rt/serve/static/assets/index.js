// src/layout.ts
var CONFIDENCE_THRESHOLD = .3;
var BODY = {
	start: 0,
	stop: 18
};
var FEET = {
	start: 18,
	stop: 24
};
var FACE = {
	start: 24,
	stop: 92
};
var LEFT_HAND = {
	start: 92,
	stop: 113
};
var RIGHT_HAND = {
	start: 113,
	stop: 134
};
var BODY_NAMES = [
	"nose",
	"neck",
	"right shoulder",
	"right elbow",
	"right wrist",
	"left shoulder",
	"left elbow",
	"left wrist",
	"right hip",
	"right knee",
	"right ankle",
	"left hip",
	"left knee",
	"left ankle",
	"right eye",
	"left eye",
	"right ear",
	"left ear"
];
var FEET_NAMES = [
	"left big toe",
	"left small toe",
	"left heel",
	"right big toe",
	"right small toe",
	"right heel"
];
/** Pairs of body points in the order of painting. Limb i and joint i both have the i-th colour. */
var LIMBS = [
	[1, 2],
	[1, 5],
	[2, 3],
	[3, 4],
	[5, 6],
	[6, 7],
	[1, 8],
	[8, 9],
	[9, 10],
	[1, 11],
	[11, 12],
	[12, 13],
	[1, 0],
	[0, 14],
	[14, 16],
	[0, 15],
	[15, 17]
];
var COLOURS = [
	[
		255,
		0,
		0
	],
	[
		255,
		85,
		0
	],
	[
		255,
		170,
		0
	],
	[
		255,
		255,
		0
	],
	[
		170,
		255,
		0
	],
	[
		85,
		255,
		0
	],
	[
		0,
		255,
		0
	],
	[
		0,
		255,
		85
	],
	[
		0,
		255,
		170
	],
	[
		0,
		255,
		255
	],
	[
		0,
		170,
		255
	],
	[
		0,
		85,
		255
	],
	[
		0,
		0,
		255
	],
	[
		85,
		0,
		255
	],
	[
		170,
		0,
		255
	],
	[
		255,
		0,
		255
	],
	[
		255,
		0,
		170
	],
	[
		255,
		0,
		85
	]
];
/** Five fingers of four bones each; a finger's first bone starts at the wrist, point 0. */
var HAND_EDGES = Array.from({ length: 20 }, (_, edge) => {
	const tip = edge + 1;
	return [tip % 4 === 1 ? 0 : tip - 1, tip];
});
/** A keypoint's name for people: "left wrist", "face 30", "right hand 4". */
function keypointName(index) {
	if (index < BODY.stop) return BODY_NAMES[index];
	if (index < FEET.stop) return FEET_NAMES[index - FEET.start];
	if (index < FACE.stop) return `face ${index - FACE.start}`;
	if (index < LEFT_HAND.stop) return `left hand ${index - LEFT_HAND.start}`;
	return `right hand ${index - RIGHT_HAND.start}`;
}
/** Whether a keypoint's confidence is high enough to draw it. */
function isVisible(points, index) {
	return points[index * 3 + 2] >= CONFIDENCE_THRESHOLD;
}
// src/track.ts
/** Decode a track from the server's JSON. Throws an Error if its parts do not fit together. */
function decodeTrack(json) {
	const bytes = Uint8Array.from(atob(json.keypoints), (character) => character.charCodeAt(0));
	const points = new Float32Array(bytes.buffer);
	if (json.num_frames < 1 || points.length !== json.num_frames * 134 * 3) throw new Error(`a pose track of ${json.num_frames} frames with ${points.length} numbers`);
	const [height, width] = json.canvas;
	return {
		fps: json.fps,
		canvas: {
			height,
			width
		},
		numFrames: json.num_frames,
		points
	};
}
/** Return one frame of a track. Nobody is seen if every confidence is 0. */
function trackPose(track, index) {
	const length = 402;
	const points = track.points.subarray(index * length, (index + 1) * length);
	const isSomebody = points.some((value, position) => position % 3 === 2 && value > 0);
	return {
		canvas: track.canvas,
		points: isSomebody ? points : null
	};
}
/** The current place in a track that plays. It has no clock: `advance` tells it how much time has passed. */
var Playback = class {
	numFrames;
	fps;
	repeats = [
		"swing",
		"loop",
		"once"
	];
	isPlaying = false;
	repeat = "loop";
	speed = 1;
	phase = 0;
	constructor(numFrames, fps) {
		this.numFrames = numFrames;
		this.fps = fps;
	}
	get index() {
		const last = this.numFrames - 1;
		const whole = Math.floor(this.phase);
		if (this.repeat !== "swing" || last === 0) return Math.min(whole, last);
		const turn = whole % (2 * last);
		return turn <= last ? turn : 2 * last - turn;
	}
	/** Advance by `elapsedMs`. A track that is played once stops at its end. */
	advance(elapsedMs) {
		if (!this.isPlaying) return;
		this.phase += elapsedMs / 1e3 * this.fps * this.speed;
		if (this.repeat === "loop") this.phase %= this.numFrames;
		else if (this.repeat === "swing") this.phase %= Math.max(2 * (this.numFrames - 1), 1);
		else if (this.phase >= this.numFrames) {
			this.phase = this.numFrames - 1;
			this.isPlaying = false;
		}
	}
	/** Play or pause. If the end was reached, playing begins at the start. */
	toggle() {
		this.isPlaying = !this.isPlaying;
		if (this.isPlaying && this.repeat === "once" && this.index === this.numFrames - 1) this.phase = 0;
	}
	seek(index) {
		this.phase = Math.max(0, Math.min(index, this.numFrames - 1));
	}
	setRepeat(repeat) {
		this.phase = this.index;
		this.repeat = repeat;
	}
};
// src/api.ts
/** A server that was told to stop reading a file needs a moment to stop. */
var BUSY_MS = 1e3;
/** Shorter than the interval between two checks of the server (INFO_EVERY_MS), so that checks never overlap. */
var INFO_TIMEOUT_MS = 4e3;
/** The most MiB that the server takes (options.py). It refuses more, but a browser may see that only after the upload. */
var MAX_POSE_FILE_MIB = 32;
var MAX_VIDEO_MIB = 256;
/** A request that the server refused, with the server's message and hint. */
var Refusal = class extends Error {
	hint;
	status;
	constructor(message, hint, status) {
		super(message);
		this.hint = hint;
		this.status = status;
	}
	get isAboutToken() {
		return this.status === 401;
	}
};
/** Return the URL for a path such as "api/info", with the page's token. The page may lie in any folder of a host. */
function address(path) {
	const url = new URL(path.replace(/^\//, ""), document.baseURI);
	const token = new URLSearchParams(location.search).get("token");
	if (token !== null) url.searchParams.set("token", token);
	return url;
}
/** Return what is served. A server that hangs counts as one that is not there. */
async function fetchInfo() {
	return await (await request("api/info", { signal: AbortSignal.timeout(INFO_TIMEOUT_MS) })).json();
}
/** The poses that the avatar was tuned on. */
async function fetchPoses() {
	return decodeTrack(await (await request("api/poses")).json());
}
/** The picture of the avatar before the first pose. */
async function fetchReference() {
	return createImageBitmap(await (await request("api/reference.jpg")).blob());
}
/** Return the poses in a pose file or in a video of any kind. The server takes a while to find them in a video. */
async function readPoses(file, type, signal) {
	const limit = type === "video/mp4" ? MAX_VIDEO_MIB : MAX_POSE_FILE_MIB;
	if (file.size > limit * 2 ** 20) throw new Error(`${file.name} has more than ${limit} MiB, the most that can be sent. Choose a shorter one`);
	const send = () => request("api/poses", {
		body: file,
		type,
		signal
	});
	return decodeTrack(await (await send().catch(async (error) => {
		if (!(error instanceof Refusal && error.status === 429)) throw error;
		await new Promise((resolve) => setTimeout(resolve, BUSY_MS));
		return send();
	})).json());
}
/** Return whether the server has a finished recording. Where it cannot be asked, it may have. */
async function hasRecording(path) {
	try {
		await (await request(path)).body?.cancel();
		return true;
	} catch (error) {
		return !(error instanceof Refusal && error.status === 404);
	}
}
/** Send the offer of a WebRTC connection and return the answer. */
async function exchangeOffer(offer) {
	return (await request("api/offer", {
		body: JSON.stringify(offer),
		type: "application/json"
	})).json();
}
async function request(path, { body, type, signal } = {}) {
	const post = body === void 0 ? {} : {
		method: "POST",
		body,
		headers: { "Content-Type": type ?? "" }
	};
	const response = await fetch(address(path), {
		...post,
		signal: signal ?? null
	}).catch((error) => {
		throw error instanceof TypeError ? /* @__PURE__ */ new Error("The server cannot be reached, or the connection broke off. Try again") : error;
	});
	if (!response.ok) throw await refusal(response);
	return response;
}
async function refusal(response) {
	const said = await response.json().catch(() => ({}));
	return new Refusal(said.message ?? `the server answered ${response.status}`, said.hint ?? null, response.status);
}
// src/backoff.ts
var FIRST_MS = 400;
var LONGEST_MS = 5e3;
var GROWTH = 1.6;
/** Return the ms before try `attempt` (from 0). They grow up to a cap and vary by ±10 %, so that clients spread out. */
function retryDelayMs(attempt, random = Math.random) {
	return Math.min(FIRST_MS * GROWTH ** attempt, LONGEST_MS) * (.9 + .2 * random());
}
// src/protocol.ts
var VERSION = 1;
var POSE = 1;
var FRAME = 2;
var POSE_HEADER_BYTES = 24;
var FRAME_HEADER_BYTES = 32;
var HELD = 1;
/** Encode a pose, little-endian: a header of 24 bytes, then 12 bytes per keypoint. */
function encodePose(pose, sequence, sentMs) {
	const count = pose.points === null ? 0 : 134;
	const bytes = /* @__PURE__ */ new ArrayBuffer(POSE_HEADER_BYTES + 12 * count);
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
function decodeFrame(bytes) {
	if (bytes.byteLength < FRAME_HEADER_BYTES) throw new Error(`a frame message of ${bytes.byteLength} bytes`);
	const view = new DataView(bytes);
	const [type, version, flags] = [
		view.getUint8(0),
		view.getUint8(1),
		view.getUint8(3)
	];
	if (type !== FRAME || version !== VERSION) throw new Error(`a message of type ${type}, version ${version}`);
	return {
		format: view.getUint8(2),
		isHeld: (flags & HELD) !== 0,
		sequence: view.getUint32(4, true),
		sentMs: view.getFloat64(8, true),
		size: {
			height: view.getUint16(16, true),
			width: view.getUint16(18, true)
		},
		dropped: view.getUint32(20, true),
		waitMs: view.getFloat32(24, true),
		renderMs: view.getFloat32(28, true),
		picture: new Uint8Array(bytes, FRAME_HEADER_BYTES)
	};
}
/** Parse a JSON message of the server. Returns null for an unknown type, such as that of a later version. */
function parseServerMessage(text) {
	const value = JSON.parse(text);
	if (typeof value !== "object" || value === null || !("type" in value)) return null;
	return [
		"ready",
		"stats",
		"recording",
		"error"
	].includes(value.type) ? value : null;
}
// src/transport.ts
/** The codes of the server's closes that are told apart here; docs/serve.md has them all. */
var BAD_REQUEST = 1008;
var FULL = 1013;
var ABNORMAL = 1006;
/** If gathering addresses works at all, or opening a connection once an offer is answered, it takes no longer than this. */
var GATHERING_MS = 1500;
var OPENING_MS = 6e3;
/** How much may still wait to be sent when a pose comes: commands, but no other pose. */
var MOST_WAITING_BYTES = 1024;
function openTransport(way, events) {
	if (way === "websocket") return openWebSocket(events);
	try {
		return openWebRtc(events);
	} catch (error) {
		console.info("no WebRTC:", error);
		queueMicrotask(() => events.onClose(ABNORMAL, "this browser has none, or does not allow it"));
		return {
			send: () => {},
			close: () => {}
		};
	}
}
function openWebSocket(events) {
	const url = address("ws");
	url.protocol = url.protocol.replace("http", "ws");
	const socket = new WebSocket(url);
	socket.binaryType = "arraybuffer";
	socket.onmessage = ({ data }) => typeof data === "string" ? events.onText(data) : events.onBytes(data);
	let hasOpened = false;
	socket.onclose = ({ code, reason }) => {
		clearTimeout(timer);
		events.onClose(code === ABNORMAL && !hasOpened ? 0 : code, reason);
	};
	const close = () => {
		clearTimeout(timer);
		socket.onmessage = socket.onclose = null;
		socket.close();
	};
	const timer = setTimeout(() => {
		close();
		events.onClose(0, "");
	}, OPENING_MS);
	socket.onopen = () => {
		hasOpened = true;
		clearTimeout(timer);
	};
	return {
		send: (data) => {
			if (socket.readyState === WebSocket.OPEN) socket.send(data);
		},
		close
	};
}
function openWebRtc(events) {
	const peer = new RTCPeerConnection();
	const channel = peer.createDataChannel("poses");
	channel.binaryType = "arraybuffer";
	let isOver = false;
	const end = () => {
		isOver = true;
		clearTimeout(timer);
		peer.close();
	};
	const fail = (code, reason) => {
		if (isOver) return;
		end();
		events.onClose(code, reason);
	};
	let timer;
	const limit = () => {
		clearTimeout(timer);
		if (!isOver) timer = setTimeout(() => fail(ABNORMAL, "the server was not reached that way"), OPENING_MS);
	};
	limit();
	channel.onopen = () => clearTimeout(timer);
	channel.onclose = () => fail(ABNORMAL, "the data channel closed");
	channel.onmessage = ({ data }) => typeof data === "string" ? events.onText(data) : events.onBytes(data);
	peer.ontrack = ({ track, streams }) => events.onVideo(streams[0] ?? new MediaStream([track]));
	peer.onconnectionstatechange = () => {
		if (peer.connectionState === "failed") fail(ABNORMAL, "the WebRTC connection was lost");
	};
	negotiate(peer, limit).catch((error) => fail(closeCode(error), error instanceof Error ? error.message : ""));
	return {
		send: (data) => {
			if (channel.readyState !== "open" || typeof data !== "string" && channel.bufferedAmount > MOST_WAITING_BYTES) return;
			channel.send(data);
		},
		close: end
	};
}
async function negotiate(peer, onAnswer) {
	peer.addTransceiver("video", { direction: "recvonly" });
	await peer.setLocalDescription(await peer.createOffer());
	await gathered(peer);
	const offer = peer.localDescription;
	const answer = await exchangeOffer({
		type: offer.type,
		sdp: offer.sdp
	});
	onAnswer();
	await peer.setRemoteDescription(answer);
}
/** Wait until the peer knows its own addresses, which the offer carries, but at most GATHERING_MS. */
function gathered(peer) {
	return new Promise((resolve) => {
		if (peer.iceGatheringState === "complete") return resolve();
		setTimeout(resolve, GATHERING_MS);
		peer.addEventListener("icegatheringstatechange", () => {
			if (peer.iceGatheringState === "complete") resolve();
		});
	});
}
/** Return the code with which a WebSocket would have closed for this refusal of an offer. */
function closeCode(error) {
	if (!(error instanceof Refusal)) return ABNORMAL;
	if (error.status === 503) return FULL;
	return error.isAboutToken ? BAD_REQUEST : ABNORMAL;
}
// src/connection.ts
/** The wait when the server is full: long enough for someone to leave, short enough to wait for. */
var FULL_RETRY_MS = 8e3;
var NO_WEBSOCKET = {
	message: "it answers, but its WebSocket cannot be reached",
	hint: "a proxy in between must pass on Upgrade and Connection"
};
var Connection = class {
	events;
	way;
	transport = null;
	timer;
	attempt = 0;
	isLive = false;
	/** An opened transport has not ended, whether the server has said `ready` or not. */
	isUnderWay = false;
	lastError = null;
	constructor(events, way = "websocket") {
		this.events = events;
		this.way = way;
	}
	/** Close any earlier connection and connect now, over `way` if it is given. */
	open(way = this.way) {
		clearTimeout(this.timer);
		this.transport?.close();
		this.events.onVideo(null);
		this.way = way;
		this.isLive = false;
		this.isUnderWay = true;
		this.lastError = null;
		this.events.onState({ kind: "connecting" });
		const isCurrent = () => this.transport === transport;
		const transport = openTransport(way, {
			onBytes: (bytes) => {
				this.attempt = 0;
				this.events.onFrame(decodeFrame(bytes));
			},
			onText: (text) => this.onText(text),
			onVideo: (stream) => this.events.onVideo(stream),
			onClose: (code, reason) => void this.onClose(code, reason, isCurrent)
		});
		this.transport = transport;
	}
	/** Drop a connection that has not ended although the server no longer answers, and reconnect. */
	giveUp() {
		if (!this.isUnderWay) return;
		this.isLive = this.isUnderWay = false;
		this.transport?.close();
		this.events.onVideo(null);
		this.retry({
			kind: "gone",
			retryInMs: retryDelayMs(this.attempt++)
		});
	}
	sendBytes(bytes) {
		if (this.isLive) this.transport?.send(bytes);
	}
	command(command) {
		if (this.isLive) this.transport?.send(JSON.stringify(command));
	}
	onText(text) {
		const message = parseServerMessage(text);
		if (message === null) return;
		if (message.type === "ready") {
			this.isLive = true;
			this.events.onState({
				kind: "live",
				ready: message,
				way: this.way
			});
		} else if (message.type === "error") this.lastError = {
			message: message.message,
			hint: message.hint
		};
		this.events.onMessage(message);
	}
	async onClose(code, reason, isCurrent) {
		const wasLive = this.isLive;
		this.isLive = this.isUnderWay = false;
		const message = this.lastError?.message ?? reason;
		if (code === 1013) return this.retry({
			kind: "full",
			message,
			retryInMs: FULL_RETRY_MS
		});
		if (code === 1011 && reason !== "" && this.lastError?.message.startsWith(reason)) {
			const { hint } = this.lastError;
			return this.retry({
				kind: "broken",
				message,
				hint,
				retryInMs: retryDelayMs(this.attempt++)
			});
		}
		const answer = wasLive && code !== 1008 ? "gone" : await askServer();
		if (!isCurrent()) return;
		if (this.way === "webrtc" && !wasLive && answer === "here" && code !== 1008) {
			this.events.onFallback(message);
			return this.open("websocket");
		}
		if (code === 0 && answer === "here") return this.retry({
			kind: "broken",
			...NO_WEBSOCKET,
			retryInMs: retryDelayMs(this.attempt++)
		});
		if (code !== 1008 && !(answer instanceof Refusal)) return this.retry({
			kind: "gone",
			retryInMs: retryDelayMs(this.attempt++)
		});
		const refusal = answer instanceof Refusal ? answer : null;
		this.events.onState({
			kind: "refused",
			message: message || refusal?.message || "the server refused the connection",
			hint: this.lastError?.hint ?? refusal?.hint ?? null,
			wantsToken: refusal !== null
		});
	}
	retry(state) {
		this.events.onState(state);
		this.timer = setTimeout(() => this.open(), state.retryInMs);
	}
};
/** Ask whether the server is there. Returns its refusal if it demands a token that the page does not have. */
async function askServer() {
	try {
		await fetchInfo();
		return "here";
	} catch (error) {
		if (!(error instanceof Refusal) || error.status >= 500) return "gone";
		return error.isAboutToken ? error : "here";
	}
}
// src/dom.ts
/** Return the element with this id. Throws an Error if it is missing or of another kind. */
function byId(id, kind) {
	const element = document.getElementById(id);
	if (!(element instanceof kind)) throw new Error(`the page has no ${kind.name} with the id ${id}`);
	return element;
}
/** Enable or disable a button. Unlike `disabled`, this lets the button keep the keyboard focus. */
function setEnabled(button, isEnabled) {
	button.ariaDisabled = String(!isEnabled);
}
/** Call `act` on every click of a button while it is enabled. */
function onClick(button, act) {
	button.onclick = () => {
		if (button.ariaDisabled !== "true") act();
	};
}
/** Calls back with every frame of the display until it is stopped. */
var FrameLoop = class {
	callback;
	handle = 0;
	constructor(callback) {
		this.callback = callback;
	}
	start() {
		this.stop();
		const step = (nowMs) => {
			this.handle = requestAnimationFrame(step);
			this.callback(nowMs);
		};
		this.handle = requestAnimationFrame(step);
	}
	stop() {
		cancelAnimationFrame(this.handle);
	}
};
/** Set an element's text only if it differs, because screen readers read every change aloud. */
function setText(element, text) {
	if (element.textContent !== text) element.textContent = text;
}
// src/pulse.ts
/** After one silence, messages may still be on their way: the line was slow, or the machine slept. */
var MOST_SILENCES = 2;
var Pulse = class {
	onLost;
	isSilent = false;
	silences = 0;
	/** onLost: called when nothing came between looks MOST_SILENCES times in a row. */
	constructor(onLost) {
		this.onLost = onLost;
	}
	/** Something came from the server. */
	beat() {
		this.isSilent = false;
		this.silences = 0;
	}
	/** Look whether anything has come since the last look. Called at intervals. */
	look() {
		if (this.isSilent) this.silences++;
		this.isSilent = true;
		if (this.silences < MOST_SILENCES) return;
		this.beat();
		this.onLost();
	}
};
// src/recorder.ts
/** The server keeps this many finished recordings of a client. */
var MOST_KEPT = 4;
var Recorder = class {
	button = byId("record", HTMLButtonElement);
	label = byId("record-label", HTMLSpanElement);
	note = byId("recording-note", HTMLParagraphElement);
	list = byId("recordings", HTMLSpanElement);
	links = /* @__PURE__ */ new Map();
	numFinished = 0;
	isOn = false;
	startedMs = 0;
	timer;
	constructor(ask) {
		onClick(this.button, () => {
			setEnabled(this.button, false);
			ask(!this.isOn);
		});
	}
	/** Note whether there is a connection. A recording ends with it and is lost. */
	setLive(isLive) {
		setEnabled(this.button, isLive);
		if (this.isOn) this.note.textContent = "The recording is lost because the connection ended.";
		this.setOn(false);
		if (!isLive) return;
		for (const url of this.links.keys()) this.withdrawIfGone(url);
	}
	/** Show whether a recording runs. The url is that of a finished recording, even while the next one runs. */
	onState({ on, url, reason }) {
		setEnabled(this.button, true);
		this.setOn(on);
		if (reason) this.note.textContent = `The recording has ended and can be saved: ${reason}.`;
		if (url !== null && !this.links.has(url)) this.offer(url);
	}
	/** Offer to save a finished recording. Earlier ones that were not saved are still offered, if the server keeps them. */
	offer(url) {
		for (const [earlier, { dataset }] of this.links) if (dataset["saved"] === "true" || this.links.size >= MOST_KEPT) this.withdraw(earlier);
		const link = document.createElement("a");
		link.href = address(url).href;
		link.download = "";
		link.textContent = ++this.numFinished === 1 ? "Save recording" : `Save recording ${this.numFinished}`;
		link.onclick = () => link.dataset["saved"] = "true";
		this.links.set(url, link);
		this.list.append(link);
	}
	withdraw(url) {
		this.links.get(url)?.remove();
		this.links.delete(url);
	}
	/** After a break, the server may have been started anew, which deletes its recordings. */
	async withdrawIfGone(url) {
		if (!await hasRecording(url)) this.withdraw(url);
	}
	setOn(isOn) {
		if (isOn === this.isOn) return;
		this.isOn = isOn;
		clearInterval(this.timer);
		this.button.ariaPressed = String(isOn);
		this.label.textContent = isOn ? "Stop 0:00" : "Record";
		if (!isOn) return;
		this.note.textContent = "";
		this.startedMs = performance.now();
		this.timer = setInterval(() => {
			const seconds = Math.floor((performance.now() - this.startedMs) / 1e3);
			this.label.textContent = `Stop ${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
		}, 500);
	}
};
// src/meter.ts
var WINDOW_MS = 2e3;
/** Looks back over the last two seconds. */
var Meter = class {
	samples = [];
	/** Add a frame that was shown at `atMs`, `latencyMs` after its pose was sent. */
	add(atMs, latencyMs) {
		this.samples.push({
			atMs,
			latencyMs
		});
	}
	/** Return the frames per second up to `nowMs` and the median latency; null with fewer than two recent frames. */
	read(nowMs) {
		this.samples = this.samples.filter((sample) => nowMs - sample.atMs < WINDOW_MS);
		if (this.samples.length < 2) return null;
		const latencies = this.samples.map((sample) => sample.latencyMs).sort((a, b) => a - b);
		const spanMs = nowMs - this.samples[0].atMs;
		return {
			fps: 1e3 * (this.samples.length - 1) / Math.max(spanMs, 1),
			latencyMs: latencies[latencies.length >> 1]
		};
	}
	/** Forget all frames; they say nothing about the next ones. */
	clear() {
		this.samples = [];
	}
};
// src/pacing.ts
/** A pose that has no answer after this time is given up; the server may have dropped it. */
var PATIENCE_MS = 1500;
/**
* Allows one more pose under way than the server works on at once, and keeps the newest of those that come meanwhile.
*
* A second pose is sent only when the server should be almost done with the first. If it came earlier, it would wait
* there and grow old; if it came later, the server would wait for it. A pipelined server does not wait: a step without
* a new pose goes to an old one. So one pose always waits there, and each frame that arrives sends the next at once.
* `send` is called with every pose that goes out.
*/
var Pacer = class {
	send;
	now;
	/** Poses that a newer one replaced before they were sent. */
	overtaken = 0;
	sequence = 0;
	inFlight = 1;
	gapMs = 0;
	underWay = [];
	waiting = null;
	constructor(send, now) {
		this.send = send;
		this.now = now;
	}
	/** Send this pose now, or as soon as an answer comes, unless a newer one comes first. */
	offer(pose) {
		this.sendAfter(this.gapMs, pose);
	}
	/**
	* Note that a frame has come for this pose. It also answers every earlier pose.
	*
	* waitMs: how long the pose waited for its turn. renderMs: how long the frame took.
	* Returns: the pose, or null if it was no longer awaited.
	*/
	acknowledge(sequence, waitMs, renderMs) {
		const isPipelined = this.inFlight > 1;
		this.gapMs = isPipelined ? renderMs : renderMs + waitMs / 2;
		const answered = this.underWay.find((sent) => sent.sequence === sequence) ?? null;
		this.underWay = this.underWay.filter((sent) => sent.sequence > sequence);
		const waiting = this.waiting;
		if (waiting !== null) this.sendAfter(isPipelined ? 0 : this.gapMs, waiting);
		return answered;
	}
	/** Send a pose whose frame has not been shown again, unless an answer is still to come. */
	offerAgain(pose) {
		this.giveUp(this.now());
		if (this.underWay.length === 0) this.offer(pose);
	}
	/** Start over on a new connection: nothing sent before is answered. inFlight: poses the server works on at once. */
	restart(inFlight = 1) {
		this.inFlight = inFlight;
		this.overtaken = 0;
		this.gapMs = 0;
		this.forget();
	}
	/** Neither send nor await earlier poses: the source changes, and the server is reset for it. */
	forget() {
		this.underWay = [];
		this.waiting = null;
	}
	sendAfter(gapMs, pose) {
		const now = this.now();
		this.giveUp(now);
		if (this.waiting !== null && this.waiting !== pose) this.overtaken++;
		const last = this.underWay.at(-1);
		if (last !== void 0 && (this.underWay.length > this.inFlight || now - last.sentMs < gapMs)) {
			this.waiting = pose;
			return;
		}
		this.waiting = null;
		this.sequence++;
		const sent = {
			sequence: this.sequence,
			sentMs: now,
			pose
		};
		this.underWay.push(sent);
		this.send(sent);
	}
	giveUp(now) {
		this.underWay = this.underWay.filter((sent) => now - sent.sentMs < PATIENCE_MS);
	}
};
/** Lets frames pass in the order of their poses, unless they are too old. Repeats of the shown frame pass. */
var FrameGate = class {
	/** Frames that came or were decoded too late, or after a newer one had been shown. */
	late = 0;
	shown = 0;
	/** Whether a frame may be shown; it counts as shown if so. */
	admit(sequence, isTooOld = false) {
		if (isTooOld || sequence < this.shown) {
			this.late++;
			return false;
		}
		this.shown = sequence;
		return true;
	}
};
// src/screen.ts
var FIGURES_EVERY_MS = 250;
/** A picture older than this is not shown; nor does the server send it. On a video track the browser decides. */
var MAX_AGE_MS = 1e3;
var Screen = class {
	view;
	onLate;
	pacer;
	gate = new FrameGate();
	meter = new Meter();
	video = document.createElement("video");
	figures = {
		fps: byId("fps", HTMLElement),
		latency: byId("latency", HTMLElement),
		dropped: byId("dropped", HTMLElement)
	};
	newest = null;
	/** The pose whose frame was shown last. */
	shown = null;
	isLive = false;
	isHeld = false;
	droppedByServer = 0;
	/** The pose that was announced last. Its frame is the video track's next picture, or follows soon. */
	onVideoTrack = null;
	/** onLate: called when a frame came too late to be shown. */
	constructor(view, send, onLate) {
		this.view = view;
		this.onLate = onLate;
		const now = () => performance.now();
		this.pacer = new Pacer((sent) => send(encodePose(sent.pose, sent.sequence, sent.sentMs)), now);
		this.video.muted = this.video.playsInline = true;
		setInterval(() => {
			this.showFigures();
			this.persist();
		}, FIGURES_EVERY_MS);
	}
	/** Make the avatar take this pose. */
	drive(pose) {
		this.newest = pose;
		if (this.isLive && !this.isHeld) this.pacer.offer(pose);
	}
	/** Stop sending because the source changes: earlier poses are dropped, and the next ones wait until `release`. */
	hold() {
		this.isHeld = true;
		this.newest = null;
		this.pacer.forget();
	}
	/** Send again: the server knows of the change. */
	release() {
		this.isHeld = false;
		if (this.isLive && this.newest !== null) this.pacer.offer(this.newest);
	}
	/**
	* Note a new connection to a server that works on `inFlight` poses at once, or (null) that there is none.
	* On a new one nothing is under way, and the newest pose is sent again.
	*/
	setLive(inFlight) {
		this.isLive = inFlight !== null;
		this.pacer.restart(inFlight ?? 1);
		this.meter.clear();
		this.gate.late = 0;
		this.droppedByServer = 0;
		if (this.isLive && !this.isHeld && this.newest !== null) this.pacer.offer(this.newest);
	}
	async onFrame(frame) {
		const sent = this.pacer.acknowledge(frame.sequence, frame.waitMs, frame.renderMs);
		this.droppedByServer = frame.dropped;
		if (frame.format === 0) {
			if (sent !== null) {
				this.onVideoTrack = sent;
				this.shown = sent.pose;
			}
			return;
		}
		const image = await createImageBitmap(new Blob([frame.picture], { type: "image/jpeg" }));
		const now = performance.now();
		const isLate = now - frame.sentMs > MAX_AGE_MS;
		if (isLate) this.onLate();
		if (this.gate.admit(frame.sequence, isLate)) {
			this.view.show(image, frame.size, sent?.pose ?? null);
			if (sent !== null) this.shown = sent.pose;
			this.meter.add(now, now - frame.sentMs);
		}
		image.close();
	}
	/** Show a video track's frames from now on, or none. */
	onVideo(stream) {
		this.video.srcObject = stream;
		this.onVideoTrack = null;
		if (stream === null) return;
		this.video.play();
		const step = () => {
			if (this.video.srcObject !== stream) return;
			this.video.requestVideoFrameCallback(step);
			const size = {
				height: this.video.videoHeight,
				width: this.video.videoWidth
			};
			const shown = this.onVideoTrack;
			this.onVideoTrack = null;
			this.view.show(this.video, size, shown?.pose ?? null);
			const now = performance.now();
			if (shown !== null) this.meter.add(now, now - shown.sentMs);
		};
		this.video.requestVideoFrameCallback(step);
	}
	/** Send the newest pose again if its frame was late or lost: in a paused clip, for example, no other pose follows. */
	persist() {
		if (this.isLive && !this.isHeld && this.newest !== null && this.newest !== this.shown) this.pacer.offerAgain(this.newest);
	}
	showFigures() {
		const read = this.meter.read(performance.now());
		const { fps, latency, dropped } = this.figures;
		fps.textContent = read === null ? "–" : read.fps.toFixed(read.fps < 10 ? 1 : 0);
		latency.textContent = read === null ? "–" : `${Math.round(read.latencyMs)} ms`;
		dropped.textContent = String(this.pacer.overtaken + this.gate.late + this.droppedByServer);
	}
};
// src/settle.ts
/** Return a function that calls `callback` once it has itself not been called for `quietMs`. */
function whenSettled(callback, quietMs) {
	let timer;
	return () => {
		clearTimeout(timer);
		timer = setTimeout(callback, quietMs);
	};
}
// src/landmarks.ts
/** The index of each body point among the 33. The neck is computed; the left shoulder is its placeholder. */
var MEDIAPIPE_BODY = [
	0,
	11,
	12,
	14,
	16,
	11,
	13,
	15,
	24,
	26,
	28,
	23,
	25,
	27,
	5,
	2,
	8,
	7
];
/** Our index and MediaPipe's of each big toe and heel. BlazePose has no small toe. */
var MEDIAPIPE_FEET = [
	[0, 31],
	[2, 29],
	[3, 32],
	[5, 30]
];
/** The face mesh's vertex nearest each iBUG point: jaw, brows, nose, eyes, outer lips, inner lips. */
var MESH_TO_IBUG = [
	162,
	234,
	93,
	58,
	172,
	136,
	149,
	148,
	152,
	377,
	378,
	365,
	397,
	288,
	323,
	454,
	389,
	71,
	63,
	105,
	66,
	107,
	336,
	296,
	334,
	293,
	301,
	168,
	197,
	5,
	4,
	75,
	97,
	2,
	326,
	305,
	33,
	160,
	158,
	133,
	153,
	144,
	362,
	385,
	387,
	263,
	373,
	380,
	61,
	39,
	37,
	0,
	267,
	269,
	291,
	405,
	314,
	17,
	84,
	181,
	78,
	82,
	13,
	312,
	308,
	317,
	14,
	87
];
var NUM_HAND_POINTS = 21;
/** Return the pose on a picture of this size. Its points are null if the tracker found nothing. */
function poseFromLandmarks(found, picture) {
	const points = /* @__PURE__ */ new Float32Array(402);
	const put = (index, landmark, confidence) => {
		if (landmark === void 0 || !isInside(landmark)) return;
		points[index * 3] = landmark.x * picture.width - .5;
		points[index * 3 + 1] = landmark.y * picture.height - .5;
		points[index * 3 + 2] = Math.min(Math.max(confidence, 0), 1);
	};
	const { pose, face, leftHand, rightHand } = found;
	MEDIAPIPE_BODY.forEach((theirs, ours) => put(BODY.start + ours, pose?.[theirs], pose?.[theirs]?.visibility ?? 1));
	for (const [ours, theirs] of MEDIAPIPE_FEET) put(FEET.start + ours, pose?.[theirs], pose?.[theirs]?.visibility ?? 1);
	MESH_TO_IBUG.forEach((theirs, ours) => put(FACE.start + ours, face?.[theirs], 1));
	for (let point = 0; point < NUM_HAND_POINTS; point++) {
		put(LEFT_HAND.start + point, leftHand?.[point], 1);
		put(RIGHT_HAND.start + point, rightHand?.[point], 1);
	}
	setNeck(points);
	return {
		canvas: picture,
		points: points.some((value, position) => position % 3 === 2 && value > 0) ? points : null
	};
}
/** The tracker also guesses hidden limbs, even outside the picture. Points outside count as not seen. */
function isInside({ x, y }) {
	return x >= 0 && x < 1 && y >= 0 && y < 1;
}
/** Set the neck to the middle of the shoulders, with the lower of their confidences. */
function setNeck(points) {
	const confidence = Math.min(points[8], points[17]);
	for (const axis of [0, 1]) {
		const sum = points[6 + axis] + points[15 + axis];
		points[3 + axis] = confidence > 0 ? sum / 2 : 0;
	}
	points[5] = confidence;
}
// src/tracker.ts
/** Where the build puts MediaPipe's own files. */
var TRACKER_FOLDER = "tracker/";
/** A tracker that takes longer for a picture leaves the page no time for anything else. */
var SLOW_MS = 300;
/** The pause of a slow tracker between two pictures: enough for the avatar's frame to arrive and be shown. */
var REST_MS = 250;
/** This installation has no tracker. */
var NoTracker = class extends Error {};
/** Finds people. All sources share one tracker, because it is large and slow to load. */
var Tracker = class {
	loading = null;
	results = null;
	isMirrored = false;
	/** Working on a picture, or resting after one. */
	isBusy = false;
	/** Whether the last picture took long. Before the first picture, true is assumed. */
	isSlow = true;
	/** Load and warm up the tracker, unless that is done. Throws NoTracker if there is none. */
	async load() {
		this.loading ??= loadHolistic((results) => this.results = results);
		try {
			return await this.loading;
		} catch (error) {
			this.forget();
			throw error;
		}
	}
	/** Find the person in a video's current picture. Returns null while the tracker is busy with an older one. */
	async find(video, isMirrored) {
		if (this.isBusy) return null;
		this.isBusy = true;
		const beginMs = performance.now();
		const size = {
			height: video.videoHeight,
			width: video.videoWidth
		};
		try {
			const holistic = await this.load();
			if (this.isMirrored !== isMirrored) holistic.setOptions({ selfieMode: isMirrored });
			this.isMirrored = isMirrored;
			this.results = null;
			await holistic.send({ image: video });
			return this.results === null ? null : understood(this.results, size);
		} catch (error) {
			this.forget();
			throw error;
		} finally {
			this.isSlow = performance.now() - beginMs > SLOW_MS;
			setTimeout(() => this.isBusy = false, this.isSlow ? REST_MS : 0);
		}
	}
	/** After an error, load another one for the next picture. */
	forget() {
		this.loading = null;
		this.isMirrored = false;
	}
};
function understood({ image, ...found }, size) {
	return {
		pose: poseFromLandmarks({
			pose: found.poseLandmarks,
			face: found.faceLandmarks,
			leftHand: found.leftHandLandmarks,
			rightHand: found.rightHandLandmarks
		}, size),
		picture: image
	};
}
/** Load MediaPipe, which is a classic script and not a module. */
async function loadHolistic(onResults) {
	if (window.Holistic === void 0) await loadScript(`${TRACKER_FOLDER}holistic.js`);
	const tracker = new window.Holistic({ locateFile: (file) => TRACKER_FOLDER + file });
	tracker.setOptions({
		modelComplexity: 0,
		smoothLandmarks: true,
		refineFaceLandmarks: false,
		enableSegmentation: false,
		selfieMode: false
	});
	tracker.onResults(onResults);
	await tracker.initialize();
	return tracker;
}
function loadScript(source) {
	return new Promise((resolve, reject) => {
		const script = document.createElement("script");
		script.src = source;
		script.onload = () => resolve();
		script.onerror = () => {
			script.remove();
			reject(new NoTracker("This installation has no tracker of people, which `make web` adds"));
		};
		document.head.append(script);
	});
}
// src/video.ts
/** Later than any video's end. Seeking there makes a browser find an end that the file does not state. */
var BEYOND_S = 1e9;
/** The browser cannot play a file. */
var Unplayable = class extends Error {};
var TrackedVideo = class {
	view;
	tracker;
	events;
	fps = 25;
	repeats = ["loop", "once"];
	video = document.createElement("video");
	isOpen = false;
	isWanted = false;
	isNew = false;
	constructor(view, tracker, events) {
		this.view = view;
		this.tracker = tracker;
		this.events = events;
		this.video.muted = this.video.playsInline = true;
		this.video.preload = "auto";
		this.video.onended = () => this.isWanted = false;
		this.video.onerror = () => {
			if (!this.isOpen) return;
			this.close();
			this.events.onProblem(new Unplayable("The video is broken from here on"));
		};
		document.addEventListener("visibilitychange", () => {
			if (document.hidden) this.video.pause();
		});
		this.watch();
	}
	/** Show a file's first picture and load the tracker. Throws Unplayable, NoTracker, or the reason of an abort. */
	async load(file, signal, onShown) {
		this.close();
		URL.revokeObjectURL(this.video.src);
		this.video.src = URL.createObjectURL(file);
		this.video.load();
		this.video.loop = true;
		await this.event("loadeddata", signal, `This browser cannot play ${file.name}`);
		if (this.video.videoWidth === 0) throw new Unplayable(`There are no pictures in ${file.name}`);
		if (!Number.isFinite(this.video.duration)) await this.findEnd(signal);
		signal.throwIfAborted();
		this.view.setBackdrop(this.video);
		this.view.show({
			canvas: this.size,
			points: null
		});
		onShown();
		await this.tracker.load();
		signal.throwIfAborted();
	}
	/** Play the loaded file from its current place. */
	open() {
		this.isOpen = true;
		this.setPlaying(true);
	}
	/** Stop, and clear the view. */
	close() {
		this.isOpen = false;
		this.setPlaying(false);
		this.view.setBackdrop(null);
	}
	get numFrames() {
		return Math.max(1, Math.round(this.video.duration * this.fps));
	}
	get index() {
		return Math.min(Math.floor(this.video.currentTime * this.fps + 1e-6), this.numFrames - 1);
	}
	get isPlaying() {
		return this.isWanted;
	}
	get repeat() {
		return this.video.loop ? "loop" : "once";
	}
	setRepeat(repeat) {
		this.video.loop = repeat === "loop";
	}
	get speed() {
		return this.video.playbackRate;
	}
	set speed(speed) {
		this.video.playbackRate = speed;
	}
	toggle() {
		this.setPlaying(!this.isWanted);
	}
	seek(index) {
		this.video.currentTime = index / this.fps;
	}
	/** Track a new picture. The video plays by itself, but waits for a slow tracker, which would miss most of it. */
	advance() {
		if (!this.isOpen || this.tracker.isBusy) return;
		if (this.isNew) this.track();
		else if (this.isWanted && this.video.paused && !this.video.ended) this.play();
	}
	get size() {
		return {
			height: this.video.videoHeight,
			width: this.video.videoWidth
		};
	}
	setPlaying(isWanted) {
		this.isWanted = isWanted;
		if (isWanted) this.play();
		else this.video.pause();
	}
	async play() {
		if (document.hidden) return;
		try {
			await this.video.play();
		} catch (error) {
			if (this.isOpen && !(error instanceof Error && error.name === "AbortError")) this.events.onProblem(error);
		}
	}
	/** Mark every picture that the video shows as new, playing or not. */
	watch() {
		this.video.requestVideoFrameCallback(() => {
			this.isNew = true;
			this.watch();
		});
	}
	async track() {
		this.isNew = false;
		if (this.tracker.isSlow) this.video.pause();
		const { src } = this.video;
		try {
			const found = await this.tracker.find(this.video, false);
			if (found === null || !this.isOpen || this.video.src !== src) return;
			this.view.setBackdrop(found.picture);
			this.events.onPose(found.pose);
		} catch (error) {
			if (!this.isOpen || this.video.src !== src) return;
			this.close();
			this.events.onProblem(error);
		}
	}
	/** Find the end of a recording that does not state its length. */
	async findEnd(signal) {
		for (const time of [BEYOND_S, 0]) {
			this.video.currentTime = time;
			await this.event("seeked", signal, "The video has no end that can be found");
		}
	}
	/** Wait for an event of the video. Throws Unplayable(failure) on an error, or the reason of an abort. */
	event(name, signal, failure) {
		return new Promise((resolve, reject) => {
			const over = new AbortController();
			const settle = (act) => () => {
				over.abort();
				act();
			};
			const options = { signal: over.signal };
			this.video.addEventListener(name, settle(resolve), options);
			this.video.addEventListener("error", settle(() => reject(new Unplayable(failure))), options);
			signal.addEventListener("abort", settle(() => reject(signal.reason)), options);
		});
	}
};
// src/files.ts
var FilePicker = class {
	events;
	panel = byId("file-panel", HTMLDivElement);
	input = byId("file", HTMLInputElement);
	status = byId("file-status", HTMLParagraphElement);
	help = byId("file-help", HTMLDivElement);
	command = byId("file-command", HTMLElement);
	sendButton = byId("file-send", HTMLButtonElement);
	reading = null;
	file = null;
	constructor(events) {
		this.events = events;
		this.input.onchange = () => {
			const file = this.input.files?.[0];
			if (file !== void 0) this.take(file);
			this.input.value = "";
		};
		this.sendButton.onclick = () => {
			if (this.file !== null) this.read(this.file, (file, signal) => this.readPoses(file, "video/mp4", signal));
		};
		this.acceptDrops();
	}
	open() {
		this.panel.hidden = false;
	}
	close() {
		this.panel.hidden = true;
		if (this.reading === null) return;
		this.reading.abort();
		this.reading = null;
		this.status.textContent = "";
	}
	/** Say whether the server can find poses in videos. It gets the pictures, so it is asked only if people say so. */
	setServerReadsVideos(does) {
		this.sendButton.hidden = !does;
	}
	/** Say whether the tracker finds a person in the video. */
	showPerson(isSomebody) {
		setText(this.status, `${this.file?.name}: ${isSomebody ? "following the person" : "nobody is in the picture"}`);
	}
	/** Say why the file cannot be played, and what to do. */
	fail(error) {
		this.status.classList.add("is-error");
		this.status.textContent = describe(error);
		if (this.file === null || !(error instanceof Unplayable || error instanceof NoTracker)) return;
		const { name } = this.file;
		this.command.textContent = `posecrafter-rt poses extract ${word(name)} -o ${word(`${name.replace(/\.[^.]*$/, "")}.json`)}`;
		this.help.hidden = false;
	}
	acceptDrops() {
		let depth = 0;
		const mark = (change) => {
			depth += change;
			document.body.classList.toggle("is-dropping", depth > 0);
		};
		document.ondragenter = () => mark(1);
		document.ondragleave = () => mark(-1);
		document.ondragover = (event) => event.preventDefault();
		document.ondrop = (event) => {
			event.preventDefault();
			mark(-depth);
			const file = event.dataTransfer?.files[0];
			if (file === void 0) return;
			this.events.onDrop();
			this.take(file);
		};
	}
	take(file) {
		return this.read(file, (chosen, signal) => isPoseFile(chosen) ? this.readPoses(chosen, "application/json", signal) : this.loadVideo(chosen, signal));
	}
	/** Read a file with `way`, unless the next file comes first. */
	async read(file, way) {
		this.reading?.abort();
		const reading = this.reading = new AbortController();
		this.file = file;
		this.events.onFile();
		this.status.classList.remove("is-error");
		this.help.hidden = true;
		try {
			await way(file, reading.signal);
		} catch (error) {
			if (!reading.signal.aborted) this.fail(error);
		}
		if (this.reading === reading) this.reading = null;
	}
	async readPoses(file, type, signal) {
		this.status.textContent = `Reading the poses of ${file.name}`;
		const track = await readPoses(file, type, signal);
		this.status.textContent = `${file.name}: ${track.numFrames} ${track.numFrames === 1 ? "pose" : "poses"}`;
		this.events.onTrack(track);
	}
	async loadVideo(file, signal) {
		if (file.type !== "" && !file.type.startsWith("video/")) throw new Error(`${file.name} is neither OpenPose JSON nor a video`);
		this.status.textContent = `Opening ${file.name}`;
		await this.events.loadVideo(file, signal, () => {
			this.status.textContent = `${file.name}: loading the tracker, which takes a while at first`;
		});
		this.status.textContent = `${file.name}: looking for the person`;
		this.events.onVideo();
	}
};
function isPoseFile(file) {
	return file.type === "application/json" || file.name.toLowerCase().endsWith(".json");
}
/** Return a file's name as one word of a shell command. */
function word(name) {
	return /^[\w.,+@%/-]+$/.test(name) && !name.startsWith("-") ? name : `'./${name.replaceAll("'", `'\\''`)}'`;
}
function describe(error) {
	if (!(error instanceof Error)) return String(error);
	const hint = "hint" in error && typeof error.hint === "string" ? `: ${error.hint}` : "";
	return error.message + hint;
}
// src/geometry.ts
function contain(picture, box) {
	const scale = Math.min(box.width / picture.width, box.height / picture.height);
	return {
		scale,
		left: (box.width - picture.width * scale) / 2,
		top: (box.height - picture.height * scale) / 2
	};
}
/** Place a picture so that it fills a frame with the same centre. placement: where the frame itself lies. */
function cover(picture, frame, placement) {
	const scale = placement.scale * Math.max(frame.width / picture.width, frame.height / picture.height);
	return {
		scale,
		left: placement.left + (frame.width * placement.scale - picture.width * scale) / 2,
		top: placement.top + (frame.height * placement.scale - picture.height * scale) / 2
	};
}
/** Return the point of the picture that lies at (x, y) of the box. Its pixel centres are at integers. */
function toPicture(placement, x, y) {
	return {
		x: (x - placement.left) / placement.scale - .5,
		y: (y - placement.top) / placement.scale - .5
	};
}
// src/kinematics.ts
/** A bone shorter than this has no usable direction. */
var SHORTEST_BONE_PX = .001;
/** The parent of each keypoint; the neck has none (-1). */
var PARENTS = Array.from({ length: 134 }, (_, index) => parentOf(index));
function parentOf(index) {
	if (index < FEET.start) return [
		1,
		-1,
		1,
		2,
		3,
		1,
		5,
		6,
		1,
		8,
		9,
		1,
		11,
		12,
		0,
		0,
		14,
		15
	][index];
	if (index < FEET.stop) return index < FEET.start + 3 ? 13 : 10;
	if (index < FACE.stop) return 0;
	return index < LEFT_HAND.stop ? handParent(index, LEFT_HAND.start, 7) : handParent(index, RIGHT_HAND.start, 4);
}
/** A hand's point 0 hangs on the wrist, the first point of each finger on point 0, any other on the one before it. */
function handParent(index, start, wrist) {
	const point = index - start;
	if (point === 0) return wrist;
	return point % 4 === 1 ? start : index - 1;
}
/** Return a joint and all its descendants. */
function subtree(joint) {
	const found = [joint];
	for (const parent of found) PARENTS.forEach((candidate, index) => {
		if (candidate === parent) found.push(index);
	});
	return found;
}
/**
* Move a joint. Its descendants move along and turn by the same angle as the joint's own bone.
*
* If the joint's parent is missing, they only shift, because there is no bone to give an angle.
* points: (134, 3), not modified. Returns: a new array.
*/
function moveJoint(points, joint, x, y) {
	const moved = points.slice();
	const [fromX, fromY] = [points[joint * 3], points[joint * 3 + 1]];
	const turn = boneTurn(points, joint, x, y);
	const [cos, sin] = [Math.cos(turn), Math.sin(turn)];
	for (const index of subtree(joint)) {
		if (points[index * 3 + 2] === 0) continue;
		const [dx, dy] = [points[index * 3] - fromX, points[index * 3 + 1] - fromY];
		moved[index * 3] = x + cos * dx - sin * dy;
		moved[index * 3 + 1] = y + sin * dx + cos * dy;
	}
	return moved;
}
/** Return the angle in radians by which a joint's bone turns when the joint moves to (x, y). */
function boneTurn(points, joint, x, y) {
	const parent = PARENTS[joint];
	if (parent < 0 || points[parent * 3 + 2] === 0) return 0;
	const [px, py] = [points[parent * 3], points[parent * 3 + 1]];
	const [ax, ay] = [points[joint * 3] - px, points[joint * 3 + 1] - py];
	const [bx, by] = [x - px, y - py];
	if (Math.min(Math.hypot(ax, ay), Math.hypot(bx, by)) < SHORTEST_BONE_PX) return 0;
	return Math.atan2(ax * by - ay * bx, ax * bx + ay * by);
}
/** Return the drawn keypoint nearest to (x, y) within `reach` pixels, or null. The body's joints win over other points. */
function nearestJoint(points, x, y, reach) {
	return nearestWithin(points, x, y, reach, 0, FEET.start) ?? nearestWithin(points, x, y, reach, FEET.stop, 134);
}
function nearestWithin(points, x, y, reach, start, stop) {
	let nearest = null;
	let distance = reach;
	for (let index = start; index < stop; index++) {
		if (!isVisible(points, index)) continue;
		const candidate = Math.hypot(points[index * 3] - x, points[index * 3 + 1] - y);
		if (candidate <= distance) [nearest, distance] = [index, candidate];
	}
	return nearest;
}
// src/joints.ts
/** How close a pointer must be to a joint, in CSS pixels. Fingers are broad. */
var REACH_PX = {
	mouse: 16,
	pen: 20,
	touch: 28
};
var ARROWS = {
	ArrowLeft: [-1, 0],
	ArrowRight: [1, 0],
	ArrowUp: [0, -1],
	ArrowDown: [0, 1]
};
/** An arrow key moves a joint by this fraction of the canvas's short side; with Shift, five times as far. */
var STEP = 1 / 100;
var LEAP = 5;
/** Without the feet, which are not drawn. */
var BODY_GROUPS = [
	["Body", BODY],
	["Face", FACE],
	["Left hand", LEFT_HAND],
	["Right hand", RIGHT_HAND]
];
var JointEditor = class {
	view;
	emit;
	panel = byId("joints-panel", HTMLDivElement);
	choice = byId("joint", HTMLSelectElement);
	place = byId("joint-place", HTMLOutputElement);
	start = null;
	pose = null;
	isActive = false;
	/** The pointer that holds the selected joint. Browsers capture fingers unasked, so a capture alone proves nothing. */
	holder = null;
	constructor(view, emit) {
		this.view = view;
		this.emit = emit;
		const { canvas } = view;
		canvas.onpointerdown = (event) => this.grab(event);
		canvas.onpointermove = (event) => this.drag(event);
		canvas.onlostpointercapture = (event) => {
			if (event.pointerId === this.holder) this.holder = null;
		};
		canvas.onkeydown = (event) => this.onKey(event);
		this.choice.onchange = () => this.select(this.selected);
		byId("joints-reset", HTMLButtonElement).onclick = () => this.reset();
	}
	/** Begin with this pose. If it is the same one as before, continue where editing stopped. */
	open(start) {
		this.isActive = true;
		this.panel.hidden = false;
		this.view.canvas.tabIndex = 0;
		this.view.canvas.role = "application";
		this.view.canvas.classList.add("is-editable");
		if (this.start !== start) {
			this.start = start;
			this.fillChoice(start.points);
			this.reset();
		} else if (this.pose !== null) this.change(this.pose.points);
		this.select(this.selected);
	}
	close() {
		this.isActive = false;
		this.panel.hidden = true;
		this.view.canvas.tabIndex = -1;
		this.view.canvas.role = "img";
		this.view.canvas.classList.remove("is-editable");
		this.view.mark(null);
	}
	get selected() {
		return Number(this.choice.value);
	}
	reset() {
		if (this.start !== null) this.change(this.start.points.slice());
	}
	fillChoice(points) {
		const groups = BODY_GROUPS.map(([label, { start, stop }]) => {
			const group = document.createElement("optgroup");
			group.label = label;
			for (let index = start; index < stop; index++) if (isVisible(points, index)) group.append(new Option(keypointName(index), String(index)));
			return group;
		});
		this.choice.replaceChildren(...groups.filter((group) => group.childElementCount > 0));
		if (isVisible(points, 1)) this.choice.value = String(1);
	}
	select(joint) {
		this.choice.value = String(joint);
		this.view.mark(joint);
		this.tellPlace();
	}
	grab(event) {
		if (!event.isPrimary || event.button !== 0) return;
		if (!this.isActive || this.pose === null || this.view.placement === null) return;
		const { x, y } = toPicture(this.view.placement, event.offsetX, event.offsetY);
		const reach = REACH_PX[event.pointerType] ?? REACH_PX.mouse;
		const joint = nearestJoint(this.pose.points, x, y, reach / this.view.placement.scale);
		if (joint === null) return;
		this.select(joint);
		this.view.canvas.setPointerCapture(event.pointerId);
		this.holder = event.pointerId;
	}
	drag(event) {
		if (!this.isActive || this.pose === null || this.view.placement === null) return;
		if (event.pointerId !== this.holder) return;
		const { x, y } = toPicture(this.view.placement, event.offsetX, event.offsetY);
		this.move(x, y);
	}
	onKey(event) {
		const arrow = ARROWS[event.key];
		if (!this.isActive || this.pose === null || arrow === void 0) return;
		if (event.ctrlKey || event.metaKey || event.altKey) return;
		event.preventDefault();
		const { canvas, points } = this.pose;
		const step = Math.min(canvas.height, canvas.width) * STEP * (event.shiftKey ? LEAP : 1);
		this.move(points[this.selected * 3] + arrow[0] * step, points[this.selected * 3 + 1] + arrow[1] * step);
	}
	/** Move the selected joint to (x, y), clamped to the canvas. */
	move(x, y) {
		if (this.pose === null) return;
		const { canvas, points } = this.pose;
		const [inX, inY] = [Math.max(0, Math.min(x, canvas.width - 1)), Math.max(0, Math.min(y, canvas.height - 1))];
		this.change(moveJoint(points, this.selected, inX, inY));
	}
	change(points) {
		this.pose = {
			canvas: this.start.canvas,
			points
		};
		this.emit(this.pose);
		this.tellPlace();
	}
	tellPlace() {
		if (this.pose === null) return;
		const [x, y] = [0, 1].map((axis) => Math.round(this.pose?.points[this.selected * 3 + axis]));
		this.place.value = `${keypointName(this.selected)} at ${x}, ${y}`;
	}
};
// src/player.ts
/** After the display slept, poses must not jump. */
var LONGEST_STEP_MS = 100;
var Player = class {
	bar = byId("player", HTMLDivElement);
	playButton = byId("play", HTMLButtonElement);
	scrubber = byId("scrub", HTMLInputElement);
	time = byId("time", HTMLOutputElement);
	repeatChoice = byId("repeat", HTMLSelectElement);
	speedChoice = byId("speed", HTMLSelectElement);
	loop = new FrameLoop((nowMs) => this.step(nowMs));
	clip = null;
	show = () => {};
	lastMs = null;
	shownIndex = -1;
	constructor() {
		this.playButton.onclick = () => this.toggle();
		this.scrubber.oninput = () => this.seek(Number(this.scrubber.value));
		this.repeatChoice.onchange = () => this.clip?.setRepeat(this.repeatChoice.value);
		this.speedChoice.onchange = () => this.setSpeed();
	}
	/** Take over a clip as it is, at the chosen speed. show: called with each index that the clip reaches. */
	start(clip, show = () => {}) {
		this.clip = clip;
		this.show = show;
		this.setSpeed();
		for (const option of this.repeatChoice.options) option.hidden = option.disabled = !clip.repeats.includes(option.value);
		this.repeatChoice.value = clip.repeat;
		this.scrubber.max = String(clip.numFrames - 1);
		this.bar.hidden = false;
		this.shownIndex = -1;
		this.lastMs = null;
		this.loop.start();
	}
	stop() {
		this.loop.stop();
		this.bar.hidden = true;
		this.clip = null;
	}
	/** Play or pause. Returns: whether there is anything to play. */
	toggle() {
		this.clip?.toggle();
		return this.clip !== null;
	}
	seek(index) {
		this.clip?.seek(index);
		this.shownIndex = -1;
	}
	setSpeed() {
		if (this.clip !== null) this.clip.speed = Number(this.speedChoice.value);
	}
	step(nowMs) {
		const elapsedMs = this.lastMs === null ? 0 : Math.min(nowMs - this.lastMs, LONGEST_STEP_MS);
		this.lastMs = nowMs;
		const { clip } = this;
		if (clip === null) return;
		clip.advance(elapsedMs);
		this.showButton(clip.isPlaying);
		if (clip.index === this.shownIndex) return;
		this.shownIndex = clip.index;
		this.show(this.shownIndex);
		this.scrubber.value = String(this.shownIndex);
		this.time.value = `${seconds(this.shownIndex, clip)} / ${seconds(clip.numFrames, clip)} s`;
		this.scrubber.setAttribute("aria-valuetext", this.time.value);
	}
	showButton(isPlaying) {
		if (this.playButton.dataset["playing"] === String(isPlaying)) return;
		this.playButton.dataset["playing"] = String(isPlaying);
		this.playButton.title = isPlaying ? "Pause (Space)" : "Play (Space)";
		this.playButton.ariaLabel = isPlaying ? "Pause" : "Play";
	}
};
function seconds(frames, clip) {
	return (frames / clip.fps).toFixed(1);
}
// src/webcam.ts
var Webcam = class {
	view;
	tracker;
	emit;
	onChange;
	panel = byId("webcam-panel", HTMLDivElement);
	button = byId("camera", HTMLButtonElement);
	mirror = byId("mirror", HTMLInputElement);
	status = byId("camera-status", HTMLParagraphElement);
	video = document.createElement("video");
	loop = new FrameLoop(() => void this.track());
	stream = null;
	/** onChange: called when the next pose may be of another person, or in another place. */
	constructor(view, tracker, emit, onChange) {
		this.view = view;
		this.tracker = tracker;
		this.emit = emit;
		this.onChange = onChange;
		this.video.muted = this.video.playsInline = true;
		onClick(this.button, () => void (this.stream === null ? this.begin() : this.end()));
		this.mirror.onchange = onChange;
	}
	open() {
		this.panel.hidden = false;
	}
	close() {
		this.panel.hidden = true;
		this.end();
	}
	async begin() {
		setEnabled(this.button, false);
		let stream = null;
		try {
			this.status.textContent = "Waiting for the camera";
			stream = await openCamera();
			if (this.panel.hidden) return stop(stream);
			this.stream = this.video.srcObject = stream;
			this.watch(stream);
			await this.video.play();
			if (this.stream !== stream) return;
			this.status.textContent = "Loading the tracker";
			await this.tracker.load();
			if (this.stream !== stream) return;
			this.status.textContent = "Looking for you";
			this.button.textContent = "Stop camera";
			this.onChange();
			this.loop.start();
		} catch (error) {
			if (this.stream !== stream) return;
			this.end();
			this.status.textContent = reason(error);
		} finally {
			setEnabled(this.button, true);
		}
	}
	/** Notice when a camera stops by itself: it was unplugged, or the browser took it away. */
	watch(stream) {
		for (const track of stream.getTracks()) track.onended = () => {
			if (this.stream !== stream) return;
			this.end();
			this.status.textContent = "The camera has stopped. Check that it is plugged in and allowed, then start it again";
		};
	}
	end() {
		this.loop.stop();
		if (this.stream !== null) stop(this.stream);
		this.stream = this.video.srcObject = null;
		this.view.setBackdrop(null);
		this.button.textContent = "Start camera";
		this.status.textContent = "";
	}
	/** Give the tracker the newest picture, unless it is still busy with an older one. */
	async track() {
		if (this.video.readyState < HTMLMediaElement.HAVE_CURRENT_DATA) return;
		const { stream } = this;
		const isMirrored = this.mirror.checked;
		try {
			const found = await this.tracker.find(this.video, isMirrored);
			if (found === null || stream === null || this.stream !== stream || this.mirror.checked !== isMirrored) return;
			this.view.setBackdrop(found.picture);
			setText(this.status, found.pose.points === null ? "Nobody is in the picture" : "Following you");
			this.emit(found.pose);
		} catch (error) {
			if (stream === null || this.stream !== stream) return;
			this.end();
			this.status.textContent = reason(error);
		}
	}
};
function stop(stream) {
	stream.getTracks().forEach((track) => track.stop());
}
async function openCamera() {
	if (navigator.mediaDevices === void 0) throw new Error("The camera needs a page from localhost or over HTTPS");
	return navigator.mediaDevices.getUserMedia({
		video: {
			width: { ideal: 640 },
			height: { ideal: 480 },
			facingMode: "user"
		},
		audio: false
	});
}
function reason(error) {
	if (!(error instanceof Error)) return "The tracker failed";
	if (error.name === "NotAllowedError") return "The camera was not allowed; allow it in the browser's address bar";
	if (error.name === "NotFoundError") return "There is no camera";
	if (error.name === "NotReadableError") return "The camera is in use by another program";
	return error.message;
}
// src/sources.ts
var Sources = class {
	onPose;
	onChange;
	player = new Player();
	editor;
	webcam;
	video;
	files;
	demoPanel = byId("demo-panel", HTMLDivElement);
	fitRow = byId("fit-row", HTMLLabelElement);
	fitBox = byId("fit", HTMLInputElement);
	name = "demo";
	demo = null;
	reference = null;
	fromFile = null;
	last = null;
	/** onPose: called with each pose to show. onChange: called when the next pose has another source or another fit. */
	constructor(view, onPose, onChange) {
		this.onPose = onPose;
		this.onChange = onChange;
		const tracker = new Tracker();
		const emit = (pose) => this.emit(pose);
		this.editor = new JointEditor(view, emit);
		this.webcam = new Webcam(view, tracker, emit, onChange);
		this.video = new TrackedVideo(view, tracker, {
			onPose: (pose) => {
				this.files.showPerson(pose.points !== null);
				emit(pose);
			},
			onProblem: (error) => {
				this.leaveFile();
				this.files.fail(error);
			}
		});
		this.files = new FilePicker({
			onDrop: () => this.choose("file"),
			onFile: () => this.leaveFile(),
			onTrack: (track) => this.playFile(track),
			loadVideo: (file, signal, onShown) => this.video.load(file, signal, onShown),
			onVideo: () => this.playFile(this.video)
		});
		this.fitBox.onchange = () => {
			onChange();
			if (this.last !== null) this.emit({ ...this.last });
		};
		for (const radio of radios()) radio.onchange = () => this.choose(radio.value);
		document.addEventListener("keydown", (event) => this.onKey(event));
	}
	/** "person" if the poses are of somebody who is to be fitted to the avatar, else "canvas". */
	get fit() {
		return this.isOfSomebody && this.fitBox.checked ? "person" : "canvas";
	}
	/** Say whether the server can find poses in videos if this page cannot. */
	setServerReadsVideos(does) {
		this.files.setServerReadsVideos(does);
	}
	/** Take the avatar's own poses. The demo or the joint editor begins, unless people have chosen another source. */
	setDemo(track) {
		this.demo = track;
		this.reference = firstPose(track);
		if (this.name === "demo" || this.name === "joints") this.begin();
	}
	get isOfSomebody() {
		return this.name === "file" || this.name === "webcam";
	}
	choose(name) {
		for (const radio of radios()) radio.checked = radio.value === name;
		this.name = name;
		this.last = null;
		this.player.stop();
		this.video.close();
		this.editor.close();
		this.webcam.close();
		this.files.close();
		this.fitRow.hidden = !this.isOfSomebody;
		this.onChange();
		this.begin();
	}
	emit(pose) {
		this.last = pose;
		this.onPose(pose);
	}
	begin() {
		this.demoPanel.hidden = this.name !== "demo";
		if (this.name === "demo" && this.demo !== null) this.play(this.demo, "swing", !prefersStillness());
		if (this.name === "webcam") this.webcam.open();
		if (this.name === "joints" && this.reference !== null) this.editor.open(this.reference);
		if (this.name !== "file") return;
		this.files.open();
		if (this.fromFile !== null) this.playFile(this.fromFile);
	}
	/** Stop playing the file: another one was chosen, or this one is broken. */
	leaveFile() {
		this.player.stop();
		this.video.close();
		this.fromFile = this.last = null;
		this.onChange();
	}
	playFile(file) {
		this.fromFile = file;
		if (!(file instanceof TrackedVideo)) return this.play(file, "loop", true);
		this.player.start(file);
		file.open();
	}
	play(track, repeat, isPlaying) {
		const playback = new Playback(track.numFrames, track.fps);
		playback.repeat = repeat;
		playback.isPlaying = isPlaying;
		this.player.start(playback, (index) => this.emit(trackPose(track, index)));
	}
	/** Space plays and pauses, except where it has a meaning of its own. */
	onKey(event) {
		const target = event.target;
		if (event.key !== " " || target.matches("button, select, a, input:not([type=range])")) return;
		if (this.player.toggle()) event.preventDefault();
	}
};
function radios() {
	return document.querySelectorAll("input[name=source]");
}
/** The first pose that shows somebody. */
function firstPose(track) {
	for (let index = 0; index < track.numFrames; index++) {
		const pose = trackPose(track, index);
		if (pose.points !== null) return pose;
	}
	return null;
}
function prefersStillness() {
	return matchMedia("(prefers-reduced-motion: reduce)").matches;
}
// src/draw.ts
/** The widths below apply to a picture whose short side has this many pixels. */
var SHORT_SIDE_PX = 512;
var STICK_WIDTH_PX = 4;
var DOT_PX = 4;
var FACE_DOT_PX = 3;
var HAND_LINE_PX = 2;
var LIMB_DIMMING = .6;
var HAND_DOT_COLOUR = "rgb(0 0 255)";
var FACE_DOT_COLOUR = "rgb(255 255 255)";
/** Paint a pose at the placement of its canvas. Feet are not drawn. */
function drawPose(context, pose, placement) {
	if (pose.points === null) return;
	const shortSide = Math.min(pose.canvas.height, pose.canvas.width) * placement.scale;
	const pen = {
		context,
		points: pose.points,
		placement,
		unit: shortSide / SHORT_SIDE_PX
	};
	drawBody(pen);
	drawHand(pen, LEFT_HAND);
	drawHand(pen, RIGHT_HAND);
	for (let index = FACE.start; index < FACE.stop; index++) drawDot(pen, index, FACE_DOT_PX, FACE_DOT_COLOUR);
}
/** Mark a keypoint with a ring. */
function drawRing(context, points, index, placement, radius) {
	const [x, y] = at({
		points,
		placement
	}, index);
	context.lineWidth = radius / 4;
	context.strokeStyle = "white";
	context.beginPath();
	context.arc(x, y, radius, 0, 2 * Math.PI);
	context.stroke();
}
function at({ points, placement }, index) {
	const [x, y] = [points[index * 3], points[index * 3 + 1]];
	return [placement.left + (x + .5) * placement.scale, placement.top + (y + .5) * placement.scale];
}
function drawBody(pen) {
	LIMBS.forEach(([start, end], limb) => drawStick(pen, start, end, rgb(limb, LIMB_DIMMING)));
	for (let index = BODY.start; index < BODY.stop; index++) drawDot(pen, index, DOT_PX, rgb(index, 1));
}
function rgb(index, dimming) {
	return `rgb(${COLOURS[index]?.map((value) => Math.trunc(value * dimming)).join(" ")})`;
}
function drawStick(pen, start, end, colour) {
	if (!isVisible(pen.points, start) || !isVisible(pen.points, end)) return;
	const [[x0, y0], [x1, y1]] = [at(pen, start), at(pen, end)];
	const angle = Math.atan2(y1 - y0, x1 - x0);
	const { context } = pen;
	context.fillStyle = colour;
	context.beginPath();
	context.ellipse((x0 + x1) / 2, (y0 + y1) / 2, Math.hypot(x1 - x0, y1 - y0) / 2, STICK_WIDTH_PX * pen.unit, angle, 0, 2 * Math.PI);
	context.fill();
}
function drawDot(pen, index, radiusPx, colour) {
	if (!isVisible(pen.points, index)) return;
	const [x, y] = at(pen, index);
	pen.context.fillStyle = colour;
	pen.context.beginPath();
	pen.context.arc(x, y, radiusPx * pen.unit, 0, 2 * Math.PI);
	pen.context.fill();
}
function drawHand(pen, hand) {
	const { context, unit } = pen;
	context.lineWidth = HAND_LINE_PX * unit;
	HAND_EDGES.forEach(([start, end], edge) => {
		const [from, to] = [hand.start + start, hand.start + end];
		if (!isVisible(pen.points, from) || !isVisible(pen.points, to)) return;
		context.strokeStyle = `hsl(${edge * 18} 100% 50%)`;
		context.beginPath();
		context.moveTo(...at(pen, from));
		context.lineTo(...at(pen, to));
		context.stroke();
	});
	for (let index = hand.start; index < hand.stop; index++) drawDot(pen, index, DOT_PX, HAND_DOT_COLOUR);
}
// src/stage.ts
var BACKDROP_OPACITY = .45;
/** Shows a pose at the screen's resolution, over the camera's or video's picture if there is one. */
var PoseView = class {
	canvas;
	context;
	pose = null;
	frame = null;
	backdrop = null;
	marked = null;
	constructor(canvas) {
		this.canvas = canvas;
		this.context = canvas.getContext("2d");
		new ResizeObserver(() => {
			canvas.width = Math.round(canvas.clientWidth * devicePixelRatio);
			canvas.height = Math.round(canvas.clientHeight * devicePixelRatio);
			this.paint();
		}).observe(canvas);
	}
	/** frame: a centred picture that the pose's canvas is scaled to cover, as on the avatar; null: show all of it. */
	show(pose, frame = null) {
		this.pose = pose;
		this.frame = frame;
		this.paint();
	}
	/** Paint this picture, dimmed, behind the next pose, which was found in it; null: none from now on. */
	setBackdrop(image) {
		this.backdrop = image;
		if (image === null) this.paint();
	}
	/** Draw a ring around a keypoint; null: around none. */
	mark(joint) {
		this.marked = joint;
		this.paint();
	}
	/** Where the pose's canvas lies within this view's canvas, in CSS pixels; null before the first pose. */
	get placement() {
		const box = {
			width: this.canvas.clientWidth,
			height: this.canvas.clientHeight
		};
		return this.pose === null ? null : this.place(this.pose.canvas, box);
	}
	place(canvas, box) {
		return this.frame === null ? contain(canvas, box) : cover(canvas, this.frame, contain(this.frame, box));
	}
	paint() {
		const { context, pose } = this;
		context.clearRect(0, 0, this.canvas.width, this.canvas.height);
		if (pose === null) return;
		const placement = this.place(pose.canvas, this.canvas);
		if (this.backdrop !== null) this.paintBackdrop(this.backdrop, pose.canvas, placement);
		drawPose(context, pose, placement);
		if (this.marked !== null && pose.points !== null) drawRing(context, pose.points, this.marked, placement, 9 * devicePixelRatio);
	}
	paintBackdrop(image, size, { left, top, scale }) {
		this.context.globalAlpha = BACKDROP_OPACITY;
		this.context.drawImage(image, left, top, size.width * scale, size.height * scale);
		this.context.globalAlpha = 1;
	}
};
/** Shows the avatar's newest frame, which the browser enlarges, and the frame's pose over it if people want that. */
var AvatarView = class {
	canvas;
	overlay;
	pose = null;
	hasOverlay = false;
	context;
	constructor(canvas, overlay) {
		this.canvas = canvas;
		this.overlay = overlay;
		this.context = canvas.getContext("2d");
		overlay.canvas.hidden = true;
	}
	/** Show a frame. pose: the pose that it shows; null: the same one as before. */
	show(image, { height, width }, pose) {
		if (this.canvas.width !== width || this.canvas.height !== height) {
			this.canvas.width = width;
			this.canvas.height = height;
		}
		this.context.drawImage(image, 0, 0, width, height);
		if (pose === null) return;
		this.pose = pose;
		this.showPose();
	}
	setOverlay(isOn) {
		this.hasOverlay = isOn;
		this.showPose();
	}
	/** Forget the shown pose: the next frames show other poses, or poses that are fitted in another way. */
	forgetPose() {
		this.pose = null;
		this.showPose();
	}
	showPose() {
		this.overlay.canvas.hidden = !this.hasOverlay || this.pose === null;
		if (this.hasOverlay && this.pose !== null) this.overlay.show(this.pose, this.canvas);
	}
};
// src/status.ts
var NOTE_MS = 8e3;
var Status = class {
	pill = byId("link", HTMLParagraphElement);
	card = byId("notice", HTMLDivElement);
	title = byId("notice-title", HTMLHeadingElement);
	text = byId("notice-text", HTMLParagraphElement);
	retryButton = byId("retry", HTMLButtonElement);
	tokenForm = byId("token-form", HTMLFormElement);
	noteLine = byId("note", HTMLParagraphElement);
	noteTimer;
	held = byId("held", HTMLParagraphElement);
	constructor(retry) {
		this.retryButton.onclick = retry;
		this.tokenForm.onsubmit = (event) => {
			event.preventDefault();
			location.search = new URLSearchParams({ token: byId("token", HTMLInputElement).value }).toString();
		};
	}
	show(state) {
		this.pill.dataset["kind"] = state.kind;
		if (state.kind !== "connecting") {
			const wantsToken = state.kind === "refused" && state.wantsToken;
			this.card.hidden = state.kind === "live";
			this.retryButton.hidden = wantsToken;
			this.tokenForm.hidden = !wantsToken;
		}
		if (state.kind !== "live") this.setHeld(false);
		switch (state.kind) {
			case "connecting":
				this.pill.textContent = "Connecting";
				return;
			case "live":
				this.pill.textContent = "Live";
				return;
			case "gone":
				this.pill.textContent = "Reconnecting";
				return this.say("The server does not answer", "The page connects again by itself as soon as it is back.");
			case "broken":
				this.pill.textContent = "Reconnecting";
				return this.say("The server cannot show the avatar", sentences(state.message, state.hint, "The page tries again by itself."));
			case "full":
				this.pill.textContent = "Full";
				return this.say("The avatar is busy", sentences(state.message, "The page tries again by itself."));
			case "refused":
				this.pill.textContent = "Refused";
				if (state.wantsToken) return this.say("A token is needed", sentence(state.message));
				return this.say("The server refused", sentences(state.message, state.hint));
		}
	}
	/** Show whether the avatar holds still because nobody is seen. */
	setHeld(isHeld) {
		setText(this.held, isHeld ? "Nobody is seen: holding still" : "");
	}
	/** Show a message for NOTE_MS. */
	note(text) {
		clearTimeout(this.noteTimer);
		setText(this.noteLine, sentence(text));
		this.noteTimer = setTimeout(() => this.noteLine.textContent = "", NOTE_MS);
	}
	say(title, text) {
		setText(this.title, title);
		setText(this.text, text);
	}
};
/** Join messages as sentences; null adds none. */
function sentences(...texts) {
	return texts.map((text) => sentence(text ?? "")).join(" ").trim();
}
/** Return a server message, which has no capital letter and no full stop, as a sentence. */
function sentence(text) {
	const trimmed = text.trim();
	if (trimmed === "") return "";
	return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}
// src/theme.ts
var THEMES = [
	"auto",
	"light",
	"dark"
];
var STORAGE_KEY = "theme";
function setUpTheme() {
	const button = byId("theme", HTMLButtonElement);
	const remembered = fromStorage((storage) => storage.getItem(STORAGE_KEY));
	let chosen = THEMES.findIndex((theme) => theme === remembered);
	if (chosen < 0) chosen = 0;
	const apply = () => {
		const theme = THEMES[chosen];
		document.documentElement.dataset["theme"] = theme;
		button.title = button.ariaLabel = `Theme: ${theme}`;
	};
	button.onclick = () => {
		chosen = (chosen + 1) % THEMES.length;
		fromStorage((storage) => storage.setItem(STORAGE_KEY, THEMES[chosen]));
		apply();
	};
	apply();
}
/** Returns null if the browser blocks storage, which it does by throwing. The choice then lasts as long as the page. */
function fromStorage(use) {
	try {
		return use(localStorage);
	} catch {
		return null;
	}
}
// src/main.ts
var INFO_EVERY_MS = 5e3;
/** Longer than the repeat interval of a held key: a change sends two commands, and ten per second are allowed. */
var SETTLING_MS = 200;
var LATENCY = "From a pose's sending to its frame on this page, the median of two seconds";
/** A video track does not say which pose a picture shows. */
var LATENCY_OF_VIDEO = "Approximate: from a pose's sending to the video's next picture once the server has sent its frame, the median of two seconds";
var WHY_NO_OVERLAY = "Not while the person is fitted: only the server knows where the fitted pose lies";
var poseView = new PoseView(byId("pose", HTMLCanvasElement));
var overlayView = new PoseView(byId("avatar-pose", HTMLCanvasElement));
var avatarView = new AvatarView(byId("avatar", HTMLCanvasElement), overlayView);
var overlayBox = byId("overlay", HTMLInputElement);
var wayChoice = byId("way", HTMLSelectElement);
var connection = new Connection({
	onState: showState,
	onFrame: (frame) => {
		pulse.beat();
		status.setHeld(frame.isHeld);
		screen.onFrame(frame);
	},
	onMessage: takeMessage,
	onVideo: (stream) => screen.onVideo(stream),
	onFallback: (reason) => {
		wayChoice.value = "websocket";
		status.note(`WebRTC did not connect, so the page uses the WebSocket${reason && `: ${reason}`}`);
	}
});
var screen = new Screen(avatarView, (bytes) => connection.sendBytes(bytes), () => {
	status.note("Frames come more than a second late, and are not shown: this machine or the line to the server is too slow");
});
var status = new Status(() => connection.open());
var pulse = new Pulse(() => connection.giveUp());
var recorder = new Recorder((on) => connection.command({
	type: "record",
	on
}));
var tellOfChange = whenSettled(() => {
	connection.command({
		type: "configure",
		fit: sources.fit
	});
	connection.command({ type: "reset" });
	screen.release();
}, SETTLING_MS);
var sources = new Sources(poseView, (pose) => {
	poseView.show(pose);
	screen.drive(pose);
}, () => {
	screen.hold();
	tellOfChange();
	avatarView.forgetPose();
	showOverlay();
});
var isLive = false;
var avatar = null;
function showState(state) {
	status.show(state);
	pulse.beat();
	isLive = state.kind === "live";
	recorder.setLive(isLive);
	if (state.kind === "live") {
		showInfo(state.ready);
		byId("latency-figure", HTMLDivElement).title = state.way === "webrtc" ? LATENCY_OF_VIDEO : LATENCY;
		connection.command({
			type: "configure",
			format: "jpeg",
			fit: sources.fit
		});
	}
	screen.setLive(state.kind === "live" ? state.ready.in_flight : null);
	if (isLive) loadAvatar();
}
function takeMessage(message) {
	pulse.beat();
	if (message.type === "recording") recorder.onState(message);
	if (message.type === "error" && isLive) status.note(message.message);
}
/** Load the avatar's name, picture and poses, and begin the demo. If the server has another avatar now, reload. */
async function loadAvatar() {
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
		console.info("the avatar is not there yet:", error);
	}
}
function showAvatar(info, reference) {
	const [height, width] = info.size;
	const name = info.name.replace(/\.engine$/, "");
	document.documentElement.style.setProperty("--aspect", `${width} / ${height}`);
	document.title = `${name} · posecrafter`;
	byId("name", HTMLSpanElement).textContent = name;
	sources.setServerReadsVideos(info.has_pose_extraction);
	avatarView.show(reference, {
		height,
		width
	}, null);
}
function showInfo(info) {
	byId("backend", HTMLElement).textContent = `${info.backend} ${info.precision}`;
	byId("sessions", HTMLElement).textContent = `${info.sessions} of ${info.max_sessions}`;
}
async function lookAtServer() {
	pulse.look();
	try {
		showInfo(await fetchInfo());
		onAnswer();
		if (avatar === null) loadAvatar();
	} catch (error) {
		if (error instanceof Refusal) onAnswer();
	}
}
/** Note an answer over HTTP. It says nothing of a live connection, over which the server sends a message each second. */
function onAnswer() {
	if (!isLive) pulse.beat();
}
/** Draw the pose over the avatar if people want it and the page knows where it lies. */
function showOverlay() {
	const isFitted = sources.fit === "person";
	overlayBox.disabled = isFitted;
	byId("overlay-switch", HTMLLabelElement).title = isFitted ? WHY_NO_OVERLAY : "";
	avatarView.setOverlay(overlayBox.checked && !isFitted);
}
setUpTheme();
overlayBox.onchange = showOverlay;
wayChoice.onchange = () => {
	status.note("");
	connection.open(wayChoice.value);
};
setInterval(() => {
	if (connection.isUnderWay && !document.hidden) lookAtServer();
}, INFO_EVERY_MS);
document.addEventListener("visibilitychange", () => pulse.beat());
loadAvatar();
connection.open();
