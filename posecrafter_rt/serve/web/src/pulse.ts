// Notices a dead connection. If the network vanishes or the server hangs, the connection does not end by itself.

/** After one silence, messages may still be on their way: the line was slow, or the machine slept. */
const MOST_SILENCES = 2;

export class Pulse {
  private isSilent = false;
  private silences = 0;

  /** onLost: called when nothing came between looks MOST_SILENCES times in a row. */
  constructor(private readonly onLost: () => void) {}

  /** Something came from the server. */
  beat(): void {
    this.isSilent = false;
    this.silences = 0;
  }

  /** Look whether anything has come since the last look. Called at intervals. */
  look(): void {
    if (this.isSilent) this.silences++;
    this.isSilent = true;
    if (this.silences < MOST_SILENCES) return;
    this.beat(); // the next connection begins anew
    this.onLost();
  }
}
