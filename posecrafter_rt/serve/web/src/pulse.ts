// Notices a dead server. If the network vanishes or the server hangs, the connection does not end by itself.

/** A single request may fail for other reasons. */
const MOST_MISSED = 2;

export class Pulse {
  private missed = 0;

  /** onLost: called when MOST_MISSED requests in a row had no answer and nothing else came meanwhile. */
  constructor(private readonly onLost: () => void) {}

  /** Something came from the server. */
  beat(): void {
    this.missed = 0;
  }

  /** A request had no answer. */
  miss(): void {
    this.missed++;
    if (this.missed < MOST_MISSED) return;
    this.missed = 0;
    this.onLost();
  }
}
