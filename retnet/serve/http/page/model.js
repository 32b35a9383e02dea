// The name of the model that the server serves.

import { current } from "./engine.js";

export const modelName = () => current()?.model.name;
