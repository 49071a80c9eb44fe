// Builds the page into ../static under names that do not change, so that a change of a source is all that a diff shows.
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { defineConfig, type Plugin } from "vite";

const TRACKER_FILES = [
  "holistic.js",
  "holistic.binarypb",
  "holistic_solution_packed_assets.data",
  "holistic_solution_packed_assets_loader.js",
  "holistic_solution_simd_wasm_bin.js",
  "holistic_solution_simd_wasm_bin.wasm",
  "holistic_solution_simd_wasm_bin.data",
  "pose_landmark_lite.tflite",
];

/** The path of a file or folder beside this one. */
function beside(path: string): string {
  return fileURLToPath(new URL(path, import.meta.url));
}

/** Puts MediaPipe's files, which it loads by itself and by name, beside the page as they are. */
function copyTracker(): Plugin {
  return {
    name: "copy-tracker",
    closeBundle() {
      mkdirSync(beside("../static/tracker"), { recursive: true });
      const copy = (from: string, name: string) => {
        writeFileSync(beside(`../static/tracker/${name}`), readFileSync(beside(from))); // not with the package's modes
      };
      for (const name of TRACKER_FILES) copy(`node_modules/@mediapipe/holistic/${name}`, name);
      copy("tracker-notice.txt", "NOTICE.txt");
    },
  };
}

export default defineConfig({
  base: "./",
  publicDir: false,
  plugins: [copyTracker()],
  build: {
    outDir: "../static",
    emptyOutDir: true,
    target: "es2022",
    minify: false,
    cssMinify: false,
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
    assetsInlineLimit: 0,
    rolldownOptions: {
      output: {
        entryFileNames: "assets/[name].js",
        chunkFileNames: "assets/[name].js",
        assetFileNames: "assets/[name][extname]",
      },
    },
  },
});
