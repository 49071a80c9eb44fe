// Finding the page's parts.

/** The element of this id. Throws an Error where it is missing or of another kind. */
export function byId<T extends Element>(id: string, kind: new () => T): T {
  const element = document.getElementById(id);
  if (!(element instanceof kind)) throw new Error(`the page has no ${kind.name} with the id ${id}`);
  return element;
}

/** Calls back with every frame of the display until it is stopped. */
export class FrameLoop {
  private handle = 0;

  constructor(private readonly callback: (nowMs: number) => void) {}

  start(): void {
    this.stop();
    const step = (nowMs: number) => {
      this.handle = requestAnimationFrame(step);
      this.callback(nowMs);
    };
    this.handle = requestAnimationFrame(step);
  }

  stop(): void {
    cancelAnimationFrame(this.handle);
  }
}

/** Let an element say this; one that says it already is left alone, for screen readers read every change aloud. */
export function setText(element: Element, text: string): void {
  if (element.textContent !== text) element.textContent = text;
}
