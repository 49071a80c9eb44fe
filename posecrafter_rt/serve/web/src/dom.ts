// Finding the page's parts.

/** The element of this id. Throws an Error where it is missing or of another kind. */
export function byId<T extends Element>(id: string, kind: new () => T): T {
  const element = document.getElementById(id);
  if (!(element instanceof kind)) throw new Error(`the page has no ${kind.name} with the id ${id}`);
  return element;
}

/** Let a button take clicks, or refuse them for now. Unlike `disabled` this leaves it the keyboard's focus. */
export function setEnabled(button: HTMLButtonElement, isEnabled: boolean): void {
  button.ariaDisabled = String(!isEnabled);
}

/** Do this whenever a button is clicked, except while it is not enabled. */
export function onClick(button: HTMLButtonElement, act: () => void): void {
  button.onclick = () => {
    if (button.ariaDisabled !== "true") act();
  };
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
