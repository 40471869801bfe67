/** The HTTP API: JSON in, JSON out, problem documents as errors. */

const PATIENCE = 30_000; // ms; a network that was changed may leave a request without an answer and without an error

/** An answer other than 2xx. `message` is a sentence for a person, `code` is stable. */
export class ApiError extends Error {
  /** @param {number} status @param {object | null} problem */
  constructor(status, problem) {
    super(problem?.detail ?? problem?.title ?? `The server answered ${status}.`);
    this.status = status;
    this.code = problem?.code ?? "http";
    this.problem = problem ?? {};
  }

  /** Whether the same request may succeed later. */
  get passing() {
    return [408, 425, 429, 500, 502, 503, 504].includes(this.status);
  }
}

/** No answer, or none of the server's: it or the network is away. */
export class Unreachable extends Error {
  constructor() {
    super("The server cannot be reached. Check the connection and try again.");
    this.code = "unreachable";
    this.passing = true;
  }
}

/**
 * One request.
 *
 * @param {string} method @param {string} path @param {{ body?: object, key?: string }} [extra]
 * @returns {Promise<any>} the JSON answer; null for 204
 * @throws {ApiError | Unreachable}
 */
export async function request(method, path, { body, key } = {}) {
  const headers = { Accept: "application/json" };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (key) headers["Idempotency-Key"] = key;
  const payload = body === undefined ? undefined : JSON.stringify(body);
  const signal = AbortSignal.timeout(PATIENCE);
  const response = await fetch(path, { method, headers, body: payload, cache: "no-store", signal }).catch(() => {
    throw new Unreachable();
  });
  if (response.status === 204) return null;
  const answer = await response.json().catch(() => null); // a proxy's error page is not JSON
  if (response.ok && answer === null) throw new Unreachable(); // a hotel's network answers in the server's place
  if (response.ok) return answer;
  if (response.status === 401) signIn();
  throw new ApiError(response.status, answer);
}

/** Go to the sign-in page. */
export function signIn() {
  location.assign("/sign-in");
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

const TRIES = 6; // for a server that answers, but not as it should
const LONGEST_PAUSE = 8000; // ms

/**
 * A request that may be sent again without harm, because it carries an Idempotency-Key or changes
 * nothing. Tried again while the trouble may pass.
 *
 * @param {string} method @param {string} path
 * @param {{ body?: object, key?: string, away?: number }} [extra] `away`: tries while no server answers at all
 */
export async function persistently(method, path, { away = TRIES, ...extra } = {}) {
  for (let n = 1; ; n++) {
    try {
      return await request(method, path, extra);
    } catch (error) {
      if (!error.passing || n >= (error.code === "unreachable" ? away : TRIES)) throw error;
      await pause(Math.min(LONGEST_PAUSE, 250 * 2 ** n) * (0.5 + Math.random() / 2));
    }
  }
}
