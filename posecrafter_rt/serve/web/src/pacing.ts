// What is sent when: the newest pose wins, nothing queues, and no frame older than the shown one is let through.
import type { Pose } from "./layout.ts";

/** A pose without an answer for so long is given up: the server may have dropped it. */
const PATIENCE_MS = 1500;

export interface Sent {
  sequence: number;
  sentMs: number;
  pose: Pose;
}

/**
 * Lets as many poses as the server works at be under way, and one more; keeps the newest of those that came meanwhile.
 *
 * A second pose sets out only when the server should be about done with the first: sooner, it would wait there and grow
 * old; later, the server would wait for it. A pipelined server does not wait: a step for which no pose is there goes to
 * one that it has had. So one always waits there, and each frame that comes calls for the next pose at once.
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
   * A frame has come for this pose, so for every earlier one too.
   *
   * waitMs, renderMs: what the pose waited for its turn, and what the frame took.
   * Returns: the pose, if it was still awaited.
   */
  acknowledge(sequence: number, waitMs: number, renderMs: number): Sent | null {
    const isPipelined = this.inFlight > 1;
    this.gapMs = isPipelined ? renderMs : renderMs + waitMs / 2; // what waited shall wait less from then on
    const answered = this.underWay.find((sent) => sent.sequence === sequence) ?? null;
    this.underWay = this.underWay.filter((sent) => sent.sequence > sequence);
    const waiting = this.waiting;
    if (waiting !== null) this.sendAfter(isPipelined ? 0 : this.gapMs, waiting);
    return answered;
  }

  /** Send a pose once more whose frame has not been shown, unless one is still to come. */
  offerAgain(pose: Pose): void {
    this.giveUp(this.now());
    if (this.underWay.length === 0) this.offer(pose);
  }

  /** The connection is a new one, to a server that works at so many poses at once: nothing sent before will be answered. */
  restart(inFlight = 1): void {
    this.inFlight = inFlight;
    this.overtaken = 0;
    this.gapMs = 0;
    this.forget();
  }

  /** What comes next is of another source, for which the server is reset: no earlier pose is sent, or awaited, any more. */
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

/** Lets frames through in the order of their poses, unless they are too old; repeats of the shown one pass. */
export class FrameGate {
  /** Frames that came, or were decoded, too late or after a newer one had been shown. */
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
