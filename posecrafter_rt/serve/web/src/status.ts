// What the page says about the connection: a word in the header, and a card over the avatar when something is wrong.
import { byId, setText } from "./dom.ts";
import type { LinkState } from "./connection.ts";

const NOTE_MS = 8000;

export class Status {
  private readonly pill = byId("link", HTMLParagraphElement);
  private readonly card = byId("notice", HTMLDivElement);
  private readonly title = byId("notice-title", HTMLHeadingElement);
  private readonly text = byId("notice-text", HTMLParagraphElement);
  private readonly retryButton = byId("retry", HTMLButtonElement);
  private readonly tokenForm = byId("token-form", HTMLFormElement);
  private readonly noteLine = byId("note", HTMLParagraphElement);
  private noteTimer: ReturnType<typeof setTimeout> | undefined;
  private readonly held = byId("held", HTMLParagraphElement);

  constructor(retry: () => void) {
    this.retryButton.onclick = retry;
    this.tokenForm.onsubmit = (event) => {
      event.preventDefault();
      location.search = new URLSearchParams({ token: byId("token", HTMLInputElement).value }).toString();
    };
  }

  show(state: LinkState): void {
    this.pill.dataset["kind"] = state.kind;
    // A visible card stays as it is during the next try, so that it does not blink, and its button keeps the focus.
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
  setHeld(isHeld: boolean): void {
    setText(this.held, isHeld ? "Nobody is seen: holding still" : "");
  }

  /** Show a message for NOTE_MS. */
  note(text: string): void {
    clearTimeout(this.noteTimer);
    setText(this.noteLine, sentence(text));
    this.noteTimer = setTimeout(() => (this.noteLine.textContent = ""), NOTE_MS);
  }

  private say(title: string, text: string): void {
    setText(this.title, title);
    setText(this.text, text);
  }
}

/** Join messages as sentences; null adds none. */
function sentences(...texts: (string | null)[]): string {
  return texts.map((text) => sentence(text ?? "")).join(" ").trim();
}

/** Return a server message, which has no capital letter and no full stop, as a sentence. */
function sentence(text: string): string {
  const trimmed = text.trim();
  if (trimmed === "") return "";
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? "" : ".");
}
