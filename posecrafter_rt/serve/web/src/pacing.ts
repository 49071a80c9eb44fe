// Decides when a pose is sent (the newest wins, nothing queues), and holds back frames older than the shown one.
import type { Pose } from "./layout.ts";

/** A pose that has no answer after this time is given up; the server may have dropped it. */
const PATIENCE_MS = 1500;

export interface Sent {
  sequence: number;
  sentMs: number;
  pose: Pose;
}

/**
 * Allows one more pose under way than the server works on at once, and keeps the newest of those that come meanwhile.
 *
 * A second pose is sent only when the server should be almost done with the first. If it came earlier, it would wait
 * there and grow old; if it came later, the server would wait for it. A pipelined server does not wait: a step without
 * a new pose goes to an old one. So one pose always waits there, and each frame that arrives sends the next at once.
 * `send` is called with every pose that goes out.
 */
export class Pacer {
  /** Poses that a newer one replaced before they were sent. */
  overtaken = 0;
  private sequence = 0;
  private inFlight = 1;
  private gapMs = 0;
  private underWay: Sent[] = [];
  private waiting: Pose | null = null;

  constructor(
    private readonly send: (sent: Sent) => void,
    private readonly now: () => number,
  ) {}

  /** Send this pose now, or as soon as an answer comes, unless a newer one comes first. */
  offer(pose: Pose): void {
    this.sendAfter(this.gapMs, pose);
  }

  /**
   * Note that a frame has come for this pose. It also answers every earlier pose.
   *
   * waitMs: how long the pose waited for its turn. renderMs: how long the frame took.
   * Returns: the pose, or null if it was no longer awaited.
   */
  acknowledge(sequence: number, waitMs: number, renderMs: number): Sent | null {
    const isPipelined = this.inFlight > 1;
    this.gapMs = isPipelined ? renderMs : renderMs + waitMs / 2; // after a wait, send the next pose later
    const answered = this.underWay.find((sent) => sent.sequence === sequence) ?? null;
    this.underWay = this.underWay.filter((sent) => sent.sequence > sequence);
    const waiting = this.waiting;
    if (waiting !== null) this.sendAfter(isPipelined ? 0 : this.gapMs, waiting);
    return answered;
  }

  /** Send a pose whose frame has not been shown again, unless an answer is still to come. */
  offerAgain(pose: Pose): void {
    this.giveUp(this.now());
    if (this.underWay.length === 0) this.offer(pose);
  }

  /** Start over on a new connection: nothing sent before is answered. inFlight: poses the server works on at once. */
  restart(inFlight = 1): void {
    this.inFlight = inFlight;
    this.overtaken = 0;
    this.gapMs = 0;
    this.forget();
  }

  /** Neither send nor await earlier poses: the source changes, and the server is reset for it. */
  forget(): void {
    this.underWay = [];
    this.waiting = null;
  }

  private sendAfter(gapMs: number, pose: Pose): void {
    const now = this.now();
    this.giveUp(now);
    if (this.waiting !== null && this.waiting !== pose) this.overtaken++;
    const last = this.underWay.at(-1);
    if (last !== undefined && (this.underWay.length > this.inFlight || now - last.sentMs < gapMs)) {
      this.waiting = pose;
      return;
    }
    this.waiting = null;
    this.sequence++;
    const sent = { sequence: this.sequence, sentMs: now, pose };
    this.underWay.push(sent);
    this.send(sent);
  }

  private giveUp(now: number): void {
    this.underWay = this.underWay.filter((sent) => now - sent.sentMs < PATIENCE_MS);
  }
}

/** Lets frames pass in the order of their poses, unless they are too old. Repeats of the shown frame pass. */
export class FrameGate {
  /** Frames that came or were decoded too late, or after a newer one had been shown. */
  late = 0;
  private shown = 0;

  /** Whether a frame may be shown; it counts as shown if so. */
  admit(sequence: number, isTooOld = false): boolean {
    if (isTooOld || sequence < this.shown) {
      this.late++;
      return false;
    }
    this.shown = sequence;
    return true;
  }
}
