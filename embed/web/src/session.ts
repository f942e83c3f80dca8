import * as ort from "onnxruntime-web/wasm";

import { cacheNames, type Graph as GraphFile, type Manifest } from "../../node/src/bundle.js";
import type { Graph, Value } from "../../node/src/cache.js";
import { DeviceError } from "../../node/src/errors.js";
import { withoutDefaults } from "./optional_inputs.js";

ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href; // the build puts ONNX Runtime's own files beside this one
export const RELEASE = ort.env.versions.web as string;
