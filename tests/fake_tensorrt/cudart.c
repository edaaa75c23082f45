/* A test double of libcudart: memory is the host's, work that was enqueued runs when its stream is waited for.

   With DOUBLE_LATE_COPIES a cudaMemcpy to the device arrives as late as CUDA allows ("API synchronization behavior": from
   pageable memory it returns once the bytes are staged): with the default stream's next operation, which a stream that
   was created not to wait for the default one does not wait for. */
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, INVALID_HANDLE = 400, ILLEGAL_ADDRESS = 700, BLOCKS = 256 };

static struct { char *start; size_t size; } blocks[BLOCKS];
static char stream;
static int (*work)(void);

void double_on_wait(int (*callback)(void)) { work = callback; }

static struct { void *to, *bytes; size_t size; } late;

static void arrive(void) {
    if (late.bytes) {
        memcpy(late.to, late.bytes, late.size);
        free(late.bytes);
        late.bytes = NULL;
    }
}

/* Bytes from an address to the end of its block; 0: it is no address of this "device". */
size_t double_bytes_at(char *address) {
    for (int i = 0; i < BLOCKS; i++)
        if (blocks[i].start && address >= blocks[i].start && address < blocks[i].start + blocks[i].size)
            return blocks[i].start + blocks[i].size - address;
    return 0;
}

int cudaMalloc(void **address, size_t size) {
    for (int i = 0; i < BLOCKS; i++)
        if (!blocks[i].start) {
            blocks[i].start = *address = malloc(size);
            blocks[i].size = size;
            return OK;
        }
    return 2; /* cudaErrorMemoryAllocation */
}

int cudaFree(void *address) {
    for (int i = 0; i < BLOCKS; i++)
        if (blocks[i].start == (char *)address) {
            free(address);
            blocks[i].start = NULL;
            return OK;
        }
    return INVALID_VALUE;
}

int cudaMemcpy(void *to, const void *from, size_t size, int kind) {
    size_t to_device = double_bytes_at(to), from_device = double_bytes_at((char *)from);
    if ((kind == 1 && !to_device) || (kind == 2 && !from_device) || kind < 1 || kind > 4 || kind == 3)
        return INVALID_VALUE;
    if ((to_device && to_device < size) || (from_device && from_device < size) || !(to_device || from_device))
        return INVALID_VALUE;
    arrive();
    if (to_device && !from_device && getenv("DOUBLE_LATE_COPIES")) {
        late.to = to;
        late.size = size;
        late.bytes = malloc(size);
        memcpy(late.bytes, from, size);
        return OK;
    }
    memcpy(to, from, size);
    return OK;
}

int cudaStreamCreateWithFlags(void **created, unsigned flags) {
    *created = &stream;
    return flags == 1 ? OK : INVALID_VALUE;
}

int cudaStreamSynchronize(void *waited) {
    if (waited && waited != &stream) return INVALID_HANDLE;
    if (!waited) arrive();
    return waited && work ? work() : OK;
}

int cudaDeviceSynchronize(void) {
    arrive();
    return work ? work() : OK;
}

int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *on) {
    int code = cudaStreamSynchronize(on); /* in the order of the stream */
    if (!code) code = cudaMemcpy(to, from, size, kind);
    arrive();
    return code;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    if (device != 0 || (attribute != 75 && attribute != 76)) return INVALID_VALUE;
    *value = attribute == 75 ? 8 : 7; /* compute capability 8.7 */
    return OK;
}
