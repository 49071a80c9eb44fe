// Helpers for the page's elements and for the frames of the display.

/** Return the element with this id. Throws an Error if it is missing or of another kind. */
export function byId<T extends Element>(id: string, kind: new () => T): T {
  const element = document.getElementById(id);
  if (!(element instanceof kind)) throw new Error(`the page has no ${kind.name} with the id ${id}`);
  return element;
}

/** Enable or disable a button. Unlike `disabled`, this lets the button keep the keyboard focus. */
export function setEnabled(button: HTMLButtonElement, isEnabled: boolean): void {
  button.ariaDisabled = String(!isEnabled);
}

/** Call `act` on every click of a button while it is enabled. */
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

/** Set an element's text only if it differs, because screen readers read every change aloud. */
export function setText(element: Element, text: string): void {
  if (element.textContent !== text) element.textContent = text;
}
