// Builds the page into ../static under fixed names, so that a diff shows only what changed in the sources.
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

/** Copies MediaPipe's files unchanged beside the page; MediaPipe loads them itself, by name. */
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
