// POST /api/v1/voucher/request on Fastify and ioredis, one script call a request: `node server.mjs`.
//
// From the environment, as for ../fastapi_app.py: PORT, REDIS_URL, COMPARE_TOKEN, COMPARE_DISTRIBUTOR,
// COMPARE_PRODUCT, COMPARE_CAMPAIGN, COMPARE_CATEGORY.

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import Fastify from 'fastify';
import { Redis } from 'ioredis';

const LIMIT = 1_000_000_000; // looked at for every request, never reached by a benchmark
const NAME = { type: 'string', pattern: '^[A-Za-z0-9._-]{1,64}$' };
const TEXT = { type: 'string' };

const schema = {
  body: {
    type: 'object',
    required: ['request_id', 'distributor_id', 'terminal_id', 'product_ids'],
    properties: {
      request_id: { type: 'string', pattern: '^[!-~]{1,128}$' },
      distributor_id: NAME,
      terminal_id: { type: 'string', pattern: '^[ -~]{1,64}$' },
      product_ids: { type: 'array', items: NAME, minItems: 1, maxItems: 16 },
    },
  },
  response: {
    200: {
      type: 'object',
      properties: {
        status: TEXT, campaign_id: TEXT, category_id: TEXT, product_id: TEXT, voucher_code: TEXT,
        serial_number: TEXT, expiry_date: TEXT, request_id: TEXT, issued_at: TEXT,
      },
    },
  },
};

const distributors = new Map([[sha256(needed('COMPARE_TOKEN')), needed('COMPARE_DISTRIBUTOR')]]);
const campaigns = new Map([
  [needed('COMPARE_PRODUCT'), [{ id: needed('COMPARE_CAMPAIGN'), category: needed('COMPARE_CATEGORY') }]],
]);

const redis = new Redis(process.env.REDIS_URL ?? 'redis://127.0.0.1:6379/0', { enableAutoPipelining: true });
redis.on('error', (fault) => console.error(String(fault)));
redis.defineCommand('issue', {
  numberOfKeys: 6,
  lua: readFileSync(new URL('../issue.lua', import.meta.url), 'utf8'),
});

const app = Fastify({
  logger: false,
  bodyLimit: 16_384,
  ajv: { customOptions: { coerceTypes: false, removeAdditional: false } }, // a number is no text
});

app.decorateRequest('distributor', '');
app.post('/api/v1/voucher/request', { schema, onRequest: authenticate }, issueVoucher);

app.setErrorHandler((fault, request, reply) => {
  if (fault.validation) {
    return problem(reply, 400, 'invalid request', 'invalid_field', fault.message);
  }
  const status = fault.statusCode ?? 500;
  if (status >= 500) {
    console.error(fault);
    return problem(reply, 500, 'internal server error', 'internal', 'a defect');
  }
  if (status === 400) {
    return problem(reply, 400, 'invalid request', 'invalid_json', fault.message);
  }
  return problem(reply, status, fault.message, fault.code, fault.message);
});

async function authenticate(request, reply) {
  const [scheme, token] = (request.headers.authorization ?? '').split(' ', 2);
  if (scheme.toLowerCase() !== 'bearer' || !token) {
    return problem(reply, 401, 'unauthorized', 'token_missing', 'a bearer token is required');
  }
  const distributor = distributors.get(sha256(token));
  if (distributor === undefined) {
    return problem(reply, 401, 'unauthorized', 'token_unknown', 'the token is not known');
  }
  request.distributor = distributor;
}

async function issueVoucher(request, reply) {
  const { request_id, distributor_id, terminal_id, product_ids } = request.body;
  const { distributor } = request;
  if (distributor_id !== distributor) {
    return problem(reply, 401, 'unauthorized', 'distributor_mismatch', "the token is another distributor's");
  }
  let status = 'no_campaign';
  for (const product of product_ids) {
    for (const campaign of campaigns.get(product) ?? []) {
      const answer = await redis.issue(
        `compare:record:${distributor}:${request_id}`, `compare:codes:${campaign.id}`,
        'compare:used:campaign', 'compare:used:distributor', 'compare:used:terminal', 'compare:outbox',
        request_id, distributor, terminal_id, product_ids.join(','), campaign.id, campaign.category, product,
        LIMIT, LIMIT, LIMIT,
      );
      status = answer[0];
      if (status === 'ISSUED' || status === 'REPLAY') {
        if (status === 'REPLAY') {
          reply.header('Idempotent-Replayed', 'true');
        }
        return {
          status: 'success', campaign_id: answer[1], category_id: answer[2], product_id: answer[3],
          voucher_code: answer[4], serial_number: answer[5], expiry_date: rfc3339(answer[6]), request_id,
          issued_at: rfc3339(answer[7]),
        };
      }
      if (status === 'REUSED') {
        const detail = 'the same request_id came with another terminal_id or product_ids';
        return problem(reply, 422, 'idempotency key reused', 'key_reused', detail, request_id);
      }
    }
  }
  const code = { CAPPED: 'cap_reached', EXHAUSTED: 'exhausted' }[status] ?? status;
  return problem(reply, 409, 'voucher unavailable', code, 'no campaign has a voucher', request_id);
}

function problem(reply, status, error, code, detail, request_id) {
  if (status === 401) {
    reply.header('WWW-Authenticate', 'Bearer');
  }
  const body = { type: 'about:blank', title: error, status, detail, error, code, request_id, retryable: false };
  return reply.code(status).type('application/problem+json').send(JSON.stringify(body));
}

function rfc3339(seconds) {
  return `${new Date(Number(seconds) * 1000).toISOString().slice(0, 19)}Z`;
}

function sha256(text) {
  return createHash('sha256').update(text).digest('hex');
}

function needed(name) {
  const value = process.env[name];
  if (!value) {
    throw new Error(`${name} is not set`);
  }
  return value;
}

await app.listen({ host: '127.0.0.1', port: Number(process.env.PORT ?? 8000) });
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.once(signal, async () => {
    await app.close();
    redis.disconnect();
  });
}
