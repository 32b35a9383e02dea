// One reply of the model: the state that it continues from, the request, and what the response tells.
//
// Each reply's state belongs to its message. A reply is written on a copy of the state before it, so that every state
// can be continued again: to regenerate, to edit, and to fork at that message.

import { events } from "./api.js";
import { modelName } from "./model.js";
import * as sessions from "./sessions.js";

const KEPT_STATES = 4; // per conversation; those of older messages are deleted

/**
 * Writes the reply to the messages of a conversation before `reply`, which is one of its messages. `progress` is called
 * after each piece. What the response tells is left in the reply. Raises ApiError, or AbortError when stopped.
 */
export async function write(conversation, reply, sampling, signal, progress) {
  const before = conversation.messages.slice(0, conversation.messages.indexOf(reply));
  const { session, messages, gone } = await base(before);
  const body = { model: modelName(), messages, ...sampling, stream: true, stream_options: { include_usage: true }, keep_session: true };
  if (session) body.session_id = session;
  const timing = { began: performance.now(), first: null, last: null };
  let kept = null;
  let usage = null;
  try {
    for await (const chunk of events("v1/chat/completions", body, signal)) {
      const [choice] = chunk.choices ?? [];
      if (choice?.delta?.content) {
        timing.last = performance.now();
        timing.first ??= timing.last;
        reply.content += choice.delta.content;
      }
      reply.finish = choice?.finish_reason ?? reply.finish;
      usage = chunk.usage ?? usage;
      kept = chunk.session ?? kept;
      progress();
    }
  } finally {
    if (session && session !== kept?.id) sessions.forget(session);
  }
  reply.tokens = kept?.tokens ?? usage?.total_tokens;
  if (kept?.id) reply.session = kept.id;
  reply.stats = statistics(timing, usage, kept, gone);
  prune(conversation);
}

/** A copy of the latest state among these messages, and the messages after it. Without a state, all messages. */
async function base(before) {
  let gone = false;
  for (let i = before.length - 1; i >= 0; i--) {
    const message = before[i];
    if (!message.session) continue;
    try {
      const copy = await sessions.fork(message.session);
      return { session: copy.id, messages: texts(before.slice(i + 1)), gone };
    } catch (error) {
      if (error.status !== 404 || message.role === "state") throw error;
      delete message.session;
      gone = true;
    }
  }
  return { session: null, messages: texts(before), gone };
}

const texts = (messages) =>
  messages.filter(({ role, content }) => role !== "state" && content !== "").map(({ role, content }) => ({ role, content }));

function statistics({ began, first, last }, usage, kept, gone) {
  const made = usage?.completion_tokens ?? 0;
  const reused = Math.max(kept?.reused_tokens ?? 0, usage?.prompt_tokens_details?.cached_tokens ?? 0);
  return {
    made,
    prompt: usage?.prompt_tokens ?? 0,
    reused,
    why: gone ? "the stored state had expired" : kept?.not_reused ?? (reused ? null : usage?.prompt_tokens_details?.prefix_miss),
    notKept: kept?.not_kept ?? null,
    first: first === null ? null : first - began,
    rate: made > 1 && last > first ? ((made - 1) / (last - first)) * 1000 : null,
  };
}

function prune(conversation) {
  const kept = conversation.messages.filter((message) => message.session && message.role !== "state");
  for (const message of kept.slice(0, -KEPT_STATES)) {
    sessions.forget(message.session);
    delete message.session;
  }
}
